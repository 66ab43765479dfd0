"""Site erasure: after the last round every site tells the sum of its patients' content codes.

From the sites' means come the projections that take the site, not a patient, out of content. Vectors and no
products: a mean can be protected by noise, and spans nobody. A site with a patient for each number of both
tells the sum of pooled content, too, from which tokens are erased. The one place where site and centre take
the sums' shapes and bounds from.
What this file does not do: it computes no sums (`client/exchanges/erasure.py`) and fits nothing
(`meduet_models/content_code.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
from meduet_models.content_code import CodeSums, code_bound
from privacy.promise import Promise

SUMS, POOLED = "sums", "pooled"
"""Names of the tensors: the vectors of `CodeSums` of codes and of pooled content, float64."""


@dataclass(frozen=True, kw_only=True)
class ErasureAsk(Ask, kind="erasure_ask"):
    """After the last round: tell the sum of your patients' codes under these weights, code included."""

    shared: Tensors


@dataclass(frozen=True, kw_only=True)
class ErasureReply(Reply, kind="erasure_reply"):
    """How many patients a site has, and the sums of their codes and of their pooled content."""

    moments: Tensors


@dataclass(frozen=True)
class ErasureSums:
    """What a site tells."""

    codes: CodeSums
    pooled: CodeSums
    """Of nobody, where the site has too few patients for both."""


def pooled_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's pooled content: the mean of layer-normed tokens is no longer."""
    return math.sqrt(plan.network.width)


def numbers_told(plan: RunPlan) -> int:
    """Numbers of both means: of so many patients they leave."""
    return plan.network.code_size + plan.network.width


def share_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's share of the sums, her counts included."""
    return math.hypot(code_bound(plan.network.code_size), 1.0, pooled_bound(plan), 1.0)


def erasure_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels."""
    return {SUMS: (plan.network.code_size + 1,), POOLED: (plan.network.width + 1,)}


def largest_erasure(plan: RunPlan, ask: ErasureAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(erasure_shapes(plan), torch.float64))


def erasure_tensors(sums: ErasureSums) -> dict[str, Tensor]:
    """The sums as they travel."""
    return {SUMS: sums.codes.to_vector(), POOLED: sums.pooled.to_vector()}


def erasure_sums(tensors: Mapping[str, Tensor], plan: RunPlan) -> ErasureSums:
    """Back from `erasure_tensors`; raises `ValueError` for other names or lengths."""
    if set(tensors) != {SUMS, POOLED} or any(tensor.ndim != 1 for tensor in tensors.values()):
        raise ValueError(
            f"Expected code sums as vectors {SUMS!r} and {POOLED!r}; got {len(tensors)} other tensors."
        )
    size, width = plan.network.code_size, plan.network.width
    return ErasureSums(
        CodeSums.from_vector(tensors[SUMS], size, code_bound(size)),
        CodeSums.from_vector(tensors[POOLED], width, pooled_bound(plan)),
    )


def code_promise(plan: RunPlan) -> Promise:
    """One patient's share of the sums is bounded where they are made."""
    return Promise(kind="erasure", bound=share_bound(plan), unit="patient statistics", enforcement="check")


def erasure_promise(plan: RunPlan, ask: ErasureAsk) -> Promise:
    """There is one erasure."""
    return code_promise(plan)


def erasure_rounds(plan: RunPlan) -> range:
    """With the last round, where there is a shared model and more than one site to tell apart."""
    shares = plan.aggregation.method != "alone" and len(plan.participants) > 1 and plan.privacy is None
    return range(plan.training.rounds, plan.training.rounds + 1) if shares else range(0)


ERASURE = Exchange(
    route="query.erasure",
    ask=ErasureAsk,
    reply=ErasureReply,
    rounds=erasure_rounds,
    largest=largest_erasure,
    promise=erasure_promise,
)
