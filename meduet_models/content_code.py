"""The content code: a few numbers per scan that know the patient and not the site, from sums that add.

Pooled content is wide, and its site means are those of a few dozen patients. Erasing the site along
directions estimated with that much noise leaves it legible in all the others (`erasure.py`: 9 to 16 points
above chance). So content is first brought down to the directions in which patients differ and renderings of
one patient do not: Fisher's discriminant of patients, where the renderings are a patient's scans in the style
of every entry of the bank, made at the site. Then the site is erased in that small space, where the same
noise leaves little behind. What comes out is whitened over patients.

What this file does not do: it changes no token (a decoder still reads all of them), and a site that was in
no sum is erased by `erase_own_site` from its own scans, not by this fit.

Source: ours. Fisher 1936; within-class covariance normalisation and nuisance attribute projection of speaker
recognition (Hatch et al. 2006, Campbell et al. 2006) treat channels as renderings are treated here; LEACE
(arXiv:2306.03819), whose whitened form is a projection. Measured in docs/log.md.

Axes: b = scans, r = renderings, n = patients, k = channels of content, q = numbers in the code, v = numbers
in a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from meduet_models.erasure import (
    ErasureMoments,
    check_semidefinite,
    from_triangle,
    patient_means,
    roots,
    to_triangle,
    triangle_length,
)

_ROUNDING = 1e-6
RIDGE = 0.1
"""Share of the covariance between patients that is added to that of renderings: no direction is taken to be
free of style because a few patients say so."""


@dataclass(frozen=True)
class RenderingMoments:
    """Sums of how much the content of one patient varies between renderings; `a + b` are those of both.

    Guarantee: each patient enters as the covariance of her renderings' content, each rendering scaled to L2
    norm at most R = `bound` first, so that adding or removing one changes `to_vector()` by at most R² in L2.
    """

    scatter: Float64[Tensor, "k k"]
    """Sum over patients of the covariance over their renderings."""
    bound: float
    """L2 norm to which the content of a rendering is scaled."""

    @staticmethod
    def of(content: Float[Tensor, "r b k"], patients: Sequence[str], bound: float) -> "RenderingMoments":
        """From pooled content of every rendering of some scans, averaged per patient first.

        One rendering varies by nothing. Raises `ValueError` without any, or when content is not finite.
        """
        if not len(content):
            raise ValueError("Expected at least one rendering of each scan; got none.")
        if not bool(torch.isfinite(content).all()):
            raise ValueError("Expected finite content; got NaN or infinity. Nothing is released.")
        x = torch.stack([patient_means(of_style.double().cpu(), patients) for of_style in content])  # r n k
        x = x * (bound / x.norm(dim=2, keepdim=True).clamp(min=bound))
        apart = x - x.mean(0)
        return RenderingMoments(torch.einsum("rnk,rnj->kj", apart, apart) / len(x), bound)

    def __add__(self, other: "RenderingMoments") -> "RenderingMoments":
        """The sums of both cohorts; raises `ValueError` when widths or bounds differ."""
        if (len(self.scatter), self.bound) != (len(other.scatter), other.bound):
            raise ValueError(
                f"Expected rendering sums of width {len(self.scatter)} and bound {self.bound}; "
                f"got {len(other.scatter)} and {other.bound}."
            )
        return RenderingMoments(self.scatter + other.scatter, self.bound)

    def check(self, patients: float) -> None:
        """Raise `ValueError` unless these can be the sums of so many patients, each within the bound."""
        if not bool(torch.isfinite(self.scatter).all()):
            raise ValueError("Expected finite rendering sums; got NaN or infinity.")
        if float(self.scatter.trace()) > patients * self.bound**2 * (1 + _ROUNDING):
            raise ValueError("Expected rendering sums within the bound per patient; they are longer.")
        check_semidefinite(self.scatter)

    def to_vector(self) -> Float64[Tensor, " v"]:
        """The upper triangle, off-diagonal · √2: its L2 norm is that of the matrix."""
        return to_triangle(self.scatter)

    @staticmethod
    def from_vector(vector: Float[Tensor, " v"], channels: int, bound: float) -> "RenderingMoments":
        """Back from `to_vector`, whether summed before or not; raises `ValueError` for another length."""
        if len(vector) != triangle_length(channels):
            raise ValueError(f"Expected {triangle_length(channels)} rendering sums; got {len(vector)}.")
        return RenderingMoments(from_triangle(vector.double(), channels), bound)


def fit_content_code(
    moments: Mapping[str, ErasureMoments], renderings: Mapping[str, RenderingMoments], size: int
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "q k"]]:
    """Fit code(x) = matrix (x - mean) for pooled content x, from the sites' sums; returns (mean, matrix).

    Patients differ within a site (the site means are taken out first), so a shift between sites never counts
    as anatomy. Raises `ValueError` unless the same two or more sites told both sums, for sums without
    variation, and for a `size` that leaves nothing once the sites' means are erased.
    """
    if len(moments) < 2 or set(moments) != set(renderings):
        raise ValueError(
            f"Expected both content sums of two or more sites; got {len(moments)} and {len(renderings)}."
        )
    if not len(moments) <= size <= len(next(iter(moments.values())).total):
        raise ValueError(f"Expected a code of at least {len(moments)} numbers, one per site; got {size}.")
    count = torch.stack([own.count for own in moments.values()])
    means = torch.stack([own.total / own.count for own in moments.values()])  # sites k
    mean = torch.stack([own.total for own in moments.values()]).sum(0) / count.sum()
    between = torch.stack([own.outer for own in moments.values()]).sum(0)
    between = (between - torch.einsum("s,sk,sj->kj", count, means, means)) / count.sum()
    within = torch.stack([own.scatter for own in renderings.values()]).sum(0) / count.sum()
    if float(between.diagonal().mean()) <= 0:
        raise ValueError("Expected content that varies between patients; its covariance is zero.")
    whiten, _ = roots(within + RIDGE * between)
    values, vectors = torch.linalg.eigh(whiten @ between @ whiten)
    discriminant = (vectors[:, -size:] / values[-size:].clamp(min=1e-12).sqrt()).T @ whiten  # q k
    apart = (means - mean) @ discriminant.T  # sites q
    _, lengths, basis = torch.linalg.svd(apart, full_matrices=False)
    basis = basis[(lengths > 1e-9 * lengths.max()) & (lengths > 1e-12)][: len(moments) - 1]
    return mean, discriminant - basis.T @ (basis @ discriminant)


def erase_own_site(codes: Float[Tensor, "b q"], patients: Sequence[str]) -> Float[Tensor, "q q"]:
    """The map that takes a site that was in no sum out of its own codes, from its own patients.

    Codes are whitened over the federation's patients and centred on them, so the site's shift is its mean and
    the map is the projection that removes that direction; nothing needs to leave the site. For a hospital
    that joined late or was held out. Raises `ValueError` without scans.
    """
    if not len(codes):
        raise ValueError("Expected codes of at least one scan; got none.")
    mean = patient_means(codes, patients).mean(0)
    direction = mean / mean.norm().clamp(min=1e-12)
    return torch.eye(len(mean), dtype=codes.dtype) - torch.outer(direction, direction)
