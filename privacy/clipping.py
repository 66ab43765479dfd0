"""Clipping: the one place where the length of what leaves a site is cut.

Works on a dict of tensors as on one long vector. Does not do: noise, or per-patient clipping inside a loss
that mixes patients (that would bound nobody; see docs/privacy).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 2.0**-20
"""Head-room for rounding of scaled float32 values: eight times half a unit in the last place."""

_BLOCK = 1 << 17
"""Values that are scaled at once: their float64 copies are as good as nothing beside them."""

_SMALLEST = 2.0**-500
"""A shorter vector may be so because the squares of its values vanished."""


@dataclass(frozen=True)
class Bounded:
    """Tensors together with the bound that they obey."""

    value: dict[str, Tensor]
    """The tensors; joint L2 norm at most `bound`."""
    bound: float
    """L2 norm."""
    norm_before: float
    """L2 norm before clipping."""


def joint_norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all tensors as one vector, in float64 without overflow; NaN if any value is NaN."""
    norms = [_norm(tensor.detach()) for tensor in tensors.values() if tensor.numel()]
    return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)


def _norm(tensor: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if _SMALLEST < norm < math.inf or math.isnan(norm):
        return norm
    peak = float(tensor.abs().max())  # squares of float64 values may leave its range
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    return peak * float(torch.linalg.vector_norm(tensor.double() / peak))


def clip_factor(norm: float, bound: float) -> float:
    """By what a vector of this L2 norm is multiplied to obey `bound`, at most 1; what a site tells of its
    clipping."""
    return min(1.0, bound / norm) if norm > 0 else 1.0


def clip(tensors: Mapping[str, Tensor], norm: float, into: Mapping[str, Tensor] | None = None) -> Bounded:
    """Scale all tensors by one factor so that their joint L2 norm is at most `norm`; leave shorter ones.

    `into`: memory for the values, in tensors of the same names and shapes; else it is their own.

    Guarantee: adding or removing one contributor (a site, at the gate) changes a sum of such values by at
    most `norm` in L2; replacing one, by at most `2 * norm`. Counts and metrics that travel beside the values
    are not covered. Raises `ValueError` for a bound that is not finite and positive, and for values that are
    not finite: there is no direction to keep.
    """
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"Expected a finite clipping norm > 0; got {norm}.")
    before = joint_norm(tensors)
    if not math.isfinite(before):
        raise ValueError("Expected finite values to clip; got NaN or infinity. Nothing is released.")
    factor = 1.0 if before <= norm else norm * (1 - _ROUNDING) / before
    value = {n: t.new_empty(t.shape) if into is None else into[n] for n, t in tensors.items()}
    for name, tensor in tensors.items():
        _scale(tensor.detach(), factor, value[name])
    return Bounded(value=value, bound=norm, norm_before=before)


def _scale(tensor: Tensor, factor: float, into: Tensor) -> None:
    """Write the product, computed in float64."""
    if factor == 1.0:
        into.copy_(tensor)
        return
    blocks, outs = torch.split(tensor.reshape(-1), _BLOCK), torch.split(into.view(-1), _BLOCK)
    for block, out in zip(blocks, outs, strict=True):
        out.copy_(block.double().mul_(factor))
