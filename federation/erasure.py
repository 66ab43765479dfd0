"""Content sums on the wire, read from the plan: the one place where site and centre take their shape from.

What this file does not do: it computes no sums (`client/answers.py`) and fits nothing
(`meduet_models/erasure.py`).
"""

import math
from collections.abc import Mapping

from torch import Tensor

from federation.plan import RunPlan
from meduet_models.erasure import ErasureMoments, erasure_length

SUMS = "sums"
"""Name of the one tensor: the vector of `ErasureMoments`, float64."""


def content_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's pooled content: the mean of layer-normed tokens is never longer than this."""
    return math.sqrt(plan.network.width)


def share_bound(plan: RunPlan) -> float:
    """L2 norm of one patient's share of the sums, her count included: content_bound² + 1."""
    return plan.network.width + 1.0


def erasure_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels."""
    return {SUMS: (erasure_length(plan.network.width),)}


def erasure_tensors(moments: ErasureMoments) -> dict[str, Tensor]:
    """The sums as they travel."""
    return {SUMS: moments.to_vector()}


def erasure_moments(tensors: Mapping[str, Tensor], plan: RunPlan) -> ErasureMoments:
    """Back from `erasure_tensors`; raises `ValueError` for another name or length."""
    if set(tensors) != {SUMS} or tensors[SUMS].ndim != 1:
        raise ValueError(
            f"Expected content sums as one vector {SUMS!r}; got {', '.join(sorted(tensors)) or 'none'}."
        )
    return ErasureMoments.from_vector(tensors[SUMS], plan.network.width, content_bound(plan))
