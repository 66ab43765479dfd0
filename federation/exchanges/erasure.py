"""Site erasure: after the last round every site tells the sum of its patients' content codes.

From the sites' means comes a projection that takes the site, not a patient, out of content. One vector and
no products: a mean can be protected by noise, and spans nobody. The one place where site and centre take the
sums' shape and bound from.
What this file does not do: it computes no sums (`client/exchanges/erasure.py`) and fits nothing
(`meduet_models/content_code.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.limits import Largest, largest_reply, promised
from federation.messages import Ask, Reply, Tensors
from federation.plan import RunPlan
from meduet_models.content_code import CodeSums, code_bound
from privacy.promise import Promise

SUMS = "sums"
"""Name of the tensor: the vector of `CodeSums`, float64."""


@dataclass(frozen=True, kw_only=True)
class ErasureAsk(Ask, kind="erasure_ask"):
    """After the last round: tell the sum of your patients' codes under these weights, code included."""

    shared: Tensors


@dataclass(frozen=True, kw_only=True)
class ErasureReply(Reply, kind="erasure_reply"):
    """How many patients a site has, and the sum of their codes."""

    moments: Tensors


def share_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's share of the sums, her count included."""
    return math.hypot(code_bound(plan.network.code_size), 1.0)


def erasure_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels."""
    return {SUMS: (plan.network.code_size + 1,)}


def largest_erasure(plan: RunPlan, ask: ErasureAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(erasure_shapes(plan), torch.float64))


def erasure_tensors(sums: CodeSums) -> dict[str, Tensor]:
    """The sums as they travel."""
    return {SUMS: sums.to_vector()}


def erasure_sums(tensors: Mapping[str, Tensor], plan: RunPlan) -> CodeSums:
    """Back from `erasure_tensors`; raises `ValueError` for another name or length."""
    if set(tensors) != {SUMS} or tensors[SUMS].ndim != 1:
        raise ValueError(f"Expected code sums as one vector {SUMS!r}; got {len(tensors)} other tensors.")
    return CodeSums.from_vector(tensors[SUMS], plan.network.code_size, code_bound(plan.network.code_size))


def erasure_promise(plan: RunPlan, ask: ErasureAsk) -> Promise:
    """One patient's share of the sums is bounded where they are made."""
    return Promise(kind="erasure", bound=share_bound(plan), unit="patient statistics", enforcement="check")


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
