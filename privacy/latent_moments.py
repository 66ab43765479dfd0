"""Protected moments: mean and spread of patients' latents along a few public axes, in one Gaussian query.

As the style code (`style_code.py`), and one thing more: beside a patient's coefficients, cut to length 1,
stand their squares, so that the centre knows how far patients spread along each axis, and can move public
scans there. What is public decides everything but the sum: public scans give the centre, the principal axes,
and the length beyond which coefficients are cut. Axes are as many as the plan says: what lies along no axis
is never asked.

What is read is drawn towards public scans as far as noise leaves open: an axis of which the noise tells
nothing has the mean and the spread that public scans have. That is done to what left, and costs nothing.

What this file does not do: it adds no noise (the gate does, `client/release.py`), and does not know what the
numbers mean. Nothing of this is anonymous: it is (epsilon, delta)-differentially private, and no more.
Source: the clipped sum with its count in one query is the Gaussian mechanism of Balle and Wang
(arXiv:1805.06530).

Axes: m = public scans, d = numbers of a scan, k = axes, v = 2 k + 1 numbers of a share, n = some of
the public scans.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from privacy.public_axes import COUNT_SHARE, QUANTILE, SMALLEST, PublicAxes, check_public, principal_axes

SHARE_BOUND = math.hypot(1.0, 1.0, COUNT_SHARE)
"""L2 norm of one patient's share, at most: coefficients, their squares, her count."""


@dataclass(frozen=True)
class Spread:
    """How coefficients spread along each axis."""

    mean: Float64[Tensor, " k"]
    variance: Float64[Tensor, " k"]


@dataclass(frozen=True)
class LatentMoments(PublicAxes):
    """The public part: how latents become a share, and how a sum of shares is read."""

    public: Spread
    """Of the public scans' own coefficients."""

    @staticmethod
    def of(public: Float[Tensor, "m d"], dimensions: int) -> "LatentMoments":
        """The principal axes of public latents.

        Raises `ValueError` for fewer public scans than axes, for ones that are not finite, and for ones that
        do not vary in so many ways.
        """
        check_public(public, dimensions)
        vectors = public.double()
        centre = vectors.mean(0)
        principal, _ = principal_axes(vectors - centre, dimensions)
        along = (vectors - centre) @ principal.T  # m k
        radius = torch.quantile(along.norm(dim=1), QUANTILE)
        coefficients = along / radius
        return LatentMoments(
            centre=centre,
            axes=principal / radius,
            back=principal.T * radius,
            public=Spread(coefficients.mean(0), coefficients.var(0, unbiased=False)),
        )

    @property
    def length(self) -> int:
        """Numbers of a share."""
        return 2 * len(self.axes) + 1

    def share(self, latents: Float[Tensor, " d"]) -> Float64[Tensor, " v"]:
        """One patient's part in the sum: coefficients, cut to length 1, their squares, and her share of the
        count; zero where her numbers are not finite.

        Guarantee: at most `SHARE_BOUND` long, whatever the latents are. So adding or removing one patient
        moves a sum of shares by at most `SHARE_BOUND` in L2; replacing one, by at most twice that.
        """
        cut = self.cut(latents)
        if cut is None:
            return torch.zeros(self.length, dtype=torch.float64)
        return torch.cat([cut, cut.square(), torch.tensor([COUNT_SHARE], dtype=torch.float64)])

    def total(self, patients: Iterable[Float[Tensor, " d"]]) -> Float64[Tensor, " v"]:
        """The sum of the shares of patients: what a site tells, with noise."""
        zero = torch.zeros(self.length, dtype=torch.float64)
        return sum((self.share(latents) for latents in patients), start=zero)

    def read(self, total: Float[Tensor, " v"], deviation: float) -> Spread:
        """Mean and spread behind a sum whose noise has this deviation, each drawn towards the public one by
        the noise's share in what it says."""
        size, count = len(self.axes), max(1.0, self.count(total))
        noise = (deviation / count) ** 2
        told, squares = total[:size].double() / count, total[size : 2 * size].double() / count
        prior = self.public
        trust = prior.variance / (prior.variance + noise)
        mean = prior.mean + trust * (told - prior.mean)
        trust = prior.variance.square() / (prior.variance.square() + noise)
        variance = prior.variance + trust * (squares - mean.square() - prior.variance)
        return Spread(mean / max(1.0, float(mean.norm())), variance.clamp(min=SMALLEST, max=1.0))

    def moved(self, latents: Float[Tensor, "n d"], spread: Spread) -> Float64[Tensor, "n d"]:
        """Public latents, moved along each axis so that all public ones together have this mean and spread
        there; how axes go together, and what lies along none, stays as it is."""
        own = (latents.double() - self.centre) @ self.axes.T
        scale = (spread.variance / self.public.variance.clamp(min=SMALLEST)).sqrt()
        told = spread.mean + scale * (own - self.public.mean)
        return latents.double() + (told - own) @ self.back.T
