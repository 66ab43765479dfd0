"""Public axes, and a patient's place along them: what noised sums of styles and of latents have in common.

Axes are the principal ones of public vectors, so they cost no privacy; a patient's place along them is cut to
length 1, as most public ones are by themselves, and the count beside it adds half a unit. What this file does
not do: say what else is in a share, or add noise (`client/release.py`).

Axes: m = public vectors, d = numbers of a vector, k = axes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

COUNT_SHARE = 0.5
"""What a patient adds to the count, in units of the bound on her place along the axes."""
QUANTILE = 0.9
"""Share of the public scans that are not cut."""
SMALLEST = 1e-6
"""Deviation below which public vectors do not vary."""
_ROUNDING = 2.0**-40


@dataclass(frozen=True)
class PublicAxes:
    """The public part of a sum: how a vector becomes a place along axes, and back."""

    centre: Float64[Tensor, " d"]
    """Mean of the public vectors."""
    axes: Float64[Tensor, "k d"]
    """From a vector minus the centre to its place; most public ones are at most 1 long."""
    back: Float64[Tensor, "d k"]
    """From a place to the vector minus the centre, along the axes."""

    def cut(self, vector: Float[Tensor, " d"]) -> Float64[Tensor, " k"] | None:
        """The place of a vector, at most 1 long whatever the vector is; None where it is not finite."""
        place = self.axes @ (vector.double() - self.centre)
        length = float(place.norm())
        return place / max(1.0, length * (1 + _ROUNDING)) if math.isfinite(length) else None

    def count(self, total: Float[Tensor, " v"]) -> float:
        """How many patients are behind a sum, whose last number counts them, as far as its noise lets tell;
        may be negative."""
        return float(total[-1]) / COUNT_SHARE


def check_public(public: Float[Tensor, "m d"], dimensions: int) -> None:
    """Raise `ValueError` for fewer public vectors than axes, and for ones that are not finite."""
    if len(public) <= dimensions or public.shape[1] < dimensions:
        raise ValueError(
            f"Expected more than {dimensions} public scans of at least as many numbers; got "
            f"{len(public)} of {public.shape[1]}."
        )
    if not bool(torch.isfinite(public).all()):
        raise ValueError("Expected finite public scans; got NaN or infinity.")


def principal_axes(
    centred: Float64[Tensor, "m d"], dimensions: int
) -> tuple[Float64[Tensor, "k d"], Float64[Tensor, " k"]]:
    """The first principal axes, each with its largest entry positive (a sign is nobody's choice), and the
    deviation along each. Raises `ValueError` for vectors that do not vary in so many ways."""
    _, lengths, rows = torch.linalg.svd(centred, full_matrices=False)
    spread = lengths[:dimensions] / math.sqrt(len(centred))
    if float(spread[-1]) <= SMALLEST:
        raise ValueError(f"Expected public scans that vary in {dimensions} ways; they do not.")
    largest = rows[:dimensions].gather(1, rows[:dimensions].abs().argmax(1, keepdim=True))
    return rows[:dimensions] * largest.sign(), spread
