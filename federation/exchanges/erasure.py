"""Site erasure: after the last round every site tells the sums of its patients' pooled content.

From them comes a projection that takes the site, not a patient, out of content. The one place where site and
centre take the sums' shape and bound from.
What this file does not do: it computes no sums (`client/exchanges/erasure.py`) and fits nothing
(`meduet_models/erasure.py`).
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
from meduet_models.content_code import RenderingMoments
from meduet_models.erasure import ErasureMoments, erasure_length, triangle_length
from privacy.promise import Promise

SUMS, RENDERINGS = "sums", "renderings"
"""Names of the tensors: the vectors of `ErasureMoments` and, where a style bank renders every scan in every
site's style, of `RenderingMoments`; float64."""


@dataclass(frozen=True, kw_only=True)
class ErasureAsk(Ask, kind="erasure_ask"):
    """After the last round: tell the sums of your pooled content under these weights."""

    shared: Tensors
    bank: Tensors


@dataclass(frozen=True, kw_only=True)
class ErasureReply(Reply, kind="erasure_reply"):
    """A site's sums of pooled content: count, sum, outer products."""

    moments: Tensors


def renders(plan: RunPlan) -> bool:
    """Whether sites can see their scans in other styles, and so tell how content varies with them."""
    return plan.style.exchange != "none"


def content_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's pooled content: the mean of layer-normed tokens is never longer than this."""
    return math.sqrt(plan.network.width)


def share_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's share of the sums, her count included.

    content_bound² + 1 of the sums, and content_bound² of the renderings where there are any.
    """
    return math.hypot(plan.network.width + 1.0, plan.network.width if renders(plan) else 0.0)


def erasure_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels."""
    shapes: dict[str, tuple[int, ...]] = {SUMS: (erasure_length(plan.network.width),)}
    return shapes | ({RENDERINGS: (triangle_length(plan.network.width),)} if renders(plan) else {})


def largest_erasure(plan: RunPlan, ask: ErasureAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(erasure_shapes(plan), torch.float64))


def erasure_tensors(moments: ErasureMoments, renderings: RenderingMoments | None) -> dict[str, Tensor]:
    """The sums as they travel."""
    optional = {} if renderings is None else {RENDERINGS: renderings.to_vector()}
    return {SUMS: moments.to_vector()} | optional


def erasure_moments(
    tensors: Mapping[str, Tensor], plan: RunPlan
) -> tuple[ErasureMoments, RenderingMoments | None]:
    """Back from `erasure_tensors`; raises `ValueError` for another name or length."""
    expected = erasure_shapes(plan)
    if set(tensors) != set(expected) or any(tensor.ndim != 1 for tensor in tensors.values()):
        raise ValueError(
            f"Expected content sums as vectors {', '.join(expected)}; got {len(tensors)} other tensors."
        )
    width, bound = plan.network.width, content_bound(plan)
    renderings = RenderingMoments.from_vector(tensors[RENDERINGS], width, bound) if renders(plan) else None
    return ErasureMoments.from_vector(tensors[SUMS], width, bound), renderings


def erasure_promise(plan: RunPlan, ask: ErasureAsk) -> Promise:
    """One patient's share of the sums is bounded where they are made."""
    return Promise(kind="erasure", bound=share_bound(plan), unit="patient statistics", enforcement="check")


def erasure_rounds(plan: RunPlan) -> range:
    """With the last round, where there is a shared model and more than one site to tell apart."""
    shares = plan.aggregation.method != "alone" and len(plan.participants) > 1
    return range(plan.training.rounds, plan.training.rounds + 1) if shares else range(0)


ERASURE = Exchange(
    route="query.erasure",
    ask=ErasureAsk,
    reply=ErasureReply,
    rounds=erasure_rounds,
    largest=largest_erasure,
    promise=erasure_promise,
)
