"""The protected code: the mean of a few numbers per patient, along public axes, in one Gaussian query.

What is public decides everything but the sum: vectors of public scans give the centre, the deviations, the
principal axes, and the length beyond which a share is cut. So a patient is a point in few dimensions in which
public scans vary about equally, at most as long as nine of ten of these, and her share of the count stands in
the same vector at half that length.

What this file does not do: it adds no noise (the gate does, `client/release.py`), and does not know what the
numbers mean (`meduet_models/style/code.py`).
Source: the clipped sum with its count in one query is the Gaussian mechanism of Balle and Wang
(arXiv:1805.06530); a covariance would cost more, and nothing reads it.

Axes: m = public scans, d = numbers of a scan, k = axes of the code, v = k + 1 numbers of a share.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from privacy.public_axes import COUNT_SHARE, QUANTILE, SMALLEST, PublicAxes, check_public, principal_axes

SHARE_BOUND = math.hypot(1.0, COUNT_SHARE)
"""L2 norm of one patient's share, at most."""


@dataclass(frozen=True)
class StyleCode(PublicAxes):
    """The public part: how a vector becomes a share, and how a sum of shares is read."""

    @staticmethod
    def of(public: Float[Tensor, "m d"], dimensions: int) -> "StyleCode":
        """The axes of public vectors.

        Raises `ValueError` for fewer public vectors than axes, for ones that are not finite, and for ones
        that do not vary in so many ways.
        """
        check_public(public, dimensions)
        vectors = public.double()
        centre = vectors.mean(0)
        deviation = vectors.std(0, unbiased=False).clamp(min=SMALLEST)
        standard = (vectors - centre) / deviation
        principal, spread = principal_axes(standard, dimensions)
        radius = torch.quantile((standard @ principal.T / spread).norm(dim=1), QUANTILE)
        return StyleCode(
            centre=centre,
            axes=principal / (spread * radius)[:, None] / deviation,
            back=deviation[:, None] * principal.T * (spread * radius),
        )

    def share(self, vector: Float[Tensor, " d"]) -> Float64[Tensor, " v"]:
        """One patient's part in the sum: her code, cut to length 1, and her share of the count; zero where
        her numbers are not finite.

        Guarantee: at most `SHARE_BOUND` long, whatever the vector is. So adding or removing one patient moves
        a sum of shares by at most `SHARE_BOUND` in L2; replacing one, by at most twice that.
        """
        cut = self.cut(vector)
        if cut is None:
            return torch.zeros(len(self.axes) + 1, dtype=torch.float64)
        return torch.cat([cut, torch.tensor([COUNT_SHARE], dtype=torch.float64)])

    def total(self, vectors: Iterable[Float[Tensor, " d"]]) -> Float64[Tensor, " v"]:
        """The sum of the shares of patients: what a site tells, with noise."""
        zero = torch.zeros(len(self.axes) + 1, dtype=torch.float64)
        return sum((self.share(vector) for vector in vectors), start=zero)

    def read(self, total: Float[Tensor, " v"]) -> Float64[Tensor, " d"]:
        """The mean vector behind a sum. No longer than the longest that patients can have; with noise the
        number of patients counts as at least one."""
        code = total[:-1].double() / max(1.0, self.count(total))
        return self.centre + self.back @ (code / max(1.0, float(code.norm())))
