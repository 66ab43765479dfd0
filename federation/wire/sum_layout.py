"""The vector of a secure sum: which value of it means what, the same at every site and at the centre.

First the weighted update, tensor by tensor in the order of the names, on the grid that the plan's bounds
leave; then how many training scans weigh, a whole number; then for each metric that is summed its value times
that weight, and the weight itself where the site has it. So counts and losses of single sites leave masked,
too, and a mean over sites is what the centre reads.

Does not do: mask (`privacy/secure_sum/`), bound (`client/release.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from federation.plan.plan import RunPlan
from federation.wire.messages import LOSS_TERMS
from privacy.secure_sum.ring import Ring, decode, encode, grid_bits, rounding_length
from privacy.secure_sum.transcript import SumRefused

MASKED = "masked"
"""Name of the vector among a reply's tensors."""
SUMMED_METRICS = (*sorted(f"loss.{term}" for term in LOSS_TERMS), "clip_factor", "grad_norm", "update_norm")
"""Of what a site says of its round in numbers, what a secure sum holds, in this order."""
LARGEST_METRIC = 1024.0
"""A metric beyond it, of either sign, counts as this."""
_ROUNDING = 1 + 2.0**-10
_BLOCK = 1 << 17


@dataclass(frozen=True)
class SumOfSites:
    """What the centre reads of a secure sum."""

    mean: dict[str, Tensor]
    """Sum of the weighted updates over the sum of the weights."""
    weight: int
    """Training scans behind it."""
    metrics: dict[str, float]
    """Means over the sites that told them, by weight."""
    norm: float
    """L2 norm of `mean`."""


@dataclass(frozen=True)
class SumLayout:
    """The layout for shared tensors of these names and shapes, under one plan."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    num_sites: int
    weight_cap: int
    clip_norm: float

    @staticmethod
    def of(plan: RunPlan, shapes: Mapping[str, Sequence[int]]) -> "SumLayout":
        """As both sides make it."""
        named = tuple((name, tuple(shapes[name])) for name in sorted(shapes))
        return SumLayout(named, len(plan.sites), plan.aggregation.weight_cap, plan.release.update_clip_norm)

    @property
    def num_values(self) -> int:
        """Values of the update."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def size(self) -> int:
        """Values of the vector."""
        return self.num_values + 1 + 2 * len(SUMMED_METRICS)

    @property
    def bits(self) -> int:
        """q of the grid of the update, so that no sum of the plan's sites wraps: a site's weighted update is
        at most `weight_cap · clip_norm` long."""
        return grid_bits(self.num_sites, self.weight_cap * self.clip_norm)

    @property
    def metric_bits(self) -> int:
        """The same for a weighted metric."""
        return grid_bits(self.num_sites, self.weight_cap * LARGEST_METRIC)

    @property
    def rounding(self) -> float:
        """By how much rounding lengthens a weighted update, at most."""
        return rounding_length(self.num_values, self.bits)

    def tensors(self, vector: Ring) -> dict[str, Tensor]:
        """The vector's own memory as the float32 tensors of an update."""
        values = torch.from_numpy(vector[: self.num_values].view(np.float32))
        parts = torch.split(values, [math.prod(shape) for _, shape in self.shapes])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}

    def encode(self, vector: Ring, weight: int, metrics: Mapping[str, float]) -> None:
        """Make the vector, not masked yet, of the weighted update that lies in its memory (`tensors`). Raises
        `ValueError` for another weight, and for values beyond the ring."""
        if not 0 < weight <= self.weight_cap:
            raise ValueError(f"Expected a weight from 1 to {self.weight_cap}; got {weight}.")
        update = vector[: self.num_values]
        encode(update.view(np.float32), self.bits, update)
        vector[self.num_values :] = [_whole(number) for number in [weight, *self._told(weight, metrics)]]

    def _told(self, weight: int, metrics: Mapping[str, float]) -> list[int]:
        numbers = []
        for name in SUMMED_METRICS:
            value = min(max(metrics.get(name, 0.0), -LARGEST_METRIC), LARGEST_METRIC)
            numbers += [round(value * weight * 2.0**self.metric_bits), weight if name in metrics else 0]
        return numbers

    def decoded(self, total: Ring, num_sites: int) -> SumOfSites:
        """What the sum of the vectors of `num_sites` sites says; its memory becomes the mean's.

        Raises `SumRefused` when it cannot be the sum of what that many sites may send.
        """
        tail = decode(total[self.num_values :], 0)
        weight = int(tail[0])
        if not num_sites <= weight <= num_sites * self.weight_cap:
            raise SumRefused(f"Expected the weights of {num_sites} sites in the sum; it holds {weight}.")
        metrics = {}
        for name, value, told in zip(SUMMED_METRICS, tail[1::2], tail[2::2], strict=True):
            if not 0 <= told <= weight:
                raise SumRefused(f"Expected a metric of at most {weight} scans in the sum; got {told:g}.")
            if told:
                metrics[name] = float(value) * 2.0**-self.metric_bits / float(told)
        squares = 0.0
        means = total[: self.num_values].view(np.float32)
        for start in range(0, self.num_values, _BLOCK):
            block = decode(total[start : min(start + _BLOCK, self.num_values)], self.bits) / weight
            squares += float(np.dot(block, block))
            means[start : start + len(block)] = block
        norm = math.sqrt(squares)
        limit = self.clip_norm * _ROUNDING
        if not norm <= limit:
            raise SumRefused(
                f"Expected a mean of L2 norm at most {self.clip_norm:g} in the sum; got {norm:.3g}."
            )
        return SumOfSites(self.tensors(total), weight, metrics, norm)


def _whole(number: int) -> int:
    return number % (1 << 32)
