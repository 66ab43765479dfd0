"""Erasure: the linear map that takes the site out of pooled content, from sums that add.

Closed form of LEACE (arXiv:2306.03819): with S the covariance of content and M the matrix of site means minus
the grand mean, W = S^(-1/2), Q an orthonormal basis of W M, r(x) = x - W⁻¹ Q Qᵀ W (x - mean). It moves
content as little as possible (in the metric of S) so that no linear probe can read the site any more, and its
rank is at most the number of sites minus 1. Each site tells a count, a sum and a sum of outer products;
nothing else is needed.

What this file does not do: nonlinear traces of the site stay (an MLP probe still reads some), and tokens are
not erased, only what pools linearly.

Axes: b = scans, n = patients, k = channels of content, v = numbers in the vector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_ROUNDING = 1e-6
_SHRINKAGE = 0.05


@dataclass(frozen=True)
class ErasureMoments:
    """Sums over the patients of a site; `a + b` are the sums of both cohorts.

    Guarantee: each patient enters as one vector x, the average over her scans, scaled to L2 norm at most R =
    `bound`. Adding or removing one patient changes `to_vector()`, counts included, by at most R² + 1 in L2.
    Not covered: anything said beside these sums.
    """

    count: Float64[Tensor, ""]
    """Patients."""
    total: Float64[Tensor, " k"]
    """Sum of x."""
    outer: Float64[Tensor, "k k"]
    """Sum of x xᵀ."""
    bound: float
    """L2 norm to which one patient's content is scaled."""

    @staticmethod
    def none(channels: int, bound: float) -> "ErasureMoments":
        """The sums over nobody."""
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"Expected a finite bound > 0 of a patient's content; got {bound}.")
        zeros = torch.zeros(channels + 1, channels, dtype=torch.float64)
        return ErasureMoments(
            torch.zeros((), dtype=torch.float64), zeros[0].clone(), zeros[1:].clone(), bound
        )

    @staticmethod
    def of(content: Float[Tensor, "b k"], patients: Sequence[str], bound: float) -> "ErasureMoments":
        """From pooled content of scans, averaged per patient first; raises `ValueError` when it is not
        finite.
        """
        if not bool(torch.isfinite(content).all()):
            raise ValueError("Expected finite content; got NaN or infinity. Nothing is released.")
        none = ErasureMoments.none(content.shape[1], bound)
        x = patient_means(content.double().cpu(), patients)  # n k
        x = x * (bound / x.norm(dim=1, keepdim=True).clamp(min=bound))
        return none + ErasureMoments(torch.tensor(len(x), dtype=torch.float64), x.sum(0), x.T @ x, bound)

    def __add__(self, other: "ErasureMoments") -> "ErasureMoments":
        """The sums of both cohorts; raises `ValueError` when widths or bounds differ."""
        if (len(self.total), self.bound) != (len(other.total), other.bound):
            raise ValueError(
                f"Expected content sums of width {len(self.total)} and bound {self.bound}; "
                f"got {len(other.total)} and {other.bound}."
            )
        return ErasureMoments(
            self.count + other.count, self.total + other.total, self.outer + other.outer, self.bound
        )

    def check(self, most: int) -> None:
        """Raise `ValueError` unless these can be the sums of whole patients, `most` of them at most, each
        within the bound: [x; 1][x; 1]ᵀ summed over vectors is positive semi-definite, whoever they are."""
        count = float(self.count)
        if not bool(torch.isfinite(self.to_vector()).all()):
            raise ValueError("Expected finite content sums; got NaN or infinity.")
        if not 0 <= count <= most or count != round(count):
            raise ValueError(f"Expected content sums of 0 to {most} whole patients; got {count:g}.")
        if float(self.outer.trace()) > count * self.bound**2 * (1 + _ROUNDING):
            raise ValueError("Expected content sums within the bound per patient; they are longer.")
        border = torch.cat([self.count[None], self.total])[:, None]  # k + 1, 1
        check_semidefinite(torch.cat([border, torch.cat([self.total[None], self.outer])], dim=1))

    def to_vector(self) -> Float64[Tensor, " v"]:
        """Count, sum · √2, and the upper triangle of outer with its off-diagonal · √2: L2 is that of [x;
        1][x; 1]ᵀ.
        """
        return torch.cat([self.count[None], self.total * math.sqrt(2.0), to_triangle(self.outer)])

    @staticmethod
    def from_vector(vector: Float[Tensor, " v"], channels: int, bound: float) -> "ErasureMoments":
        """Back from `to_vector`, whether summed before or not; raises `ValueError` for another length."""
        if len(vector) != erasure_length(channels):
            raise ValueError(f"Expected {erasure_length(channels)} content sums; got {len(vector)}.")
        vector = vector.double()
        outer = from_triangle(vector[channels + 1 :], channels)
        return ErasureMoments(vector[0].clone(), vector[1 : channels + 1] / math.sqrt(2.0), outer, bound)


def check_semidefinite(matrix: Float64[Tensor, "k k"]) -> None:
    """Raise `ValueError` for a finite symmetric matrix that is no sum of outer products of any vectors."""
    values = torch.linalg.eigvalsh(matrix)
    if float(values[0]) < -_ROUNDING * float(values[-1].abs()):
        raise ValueError("Expected sums of outer products; these are those of no patients, whoever they are.")


def erasure_length(channels: int) -> int:
    """Numbers in the vector of `ErasureMoments` of this width."""
    return 1 + channels + triangle_length(channels)


def triangle_length(channels: int) -> int:
    """Numbers in the upper triangle of a symmetric matrix."""
    return channels * (channels + 1) // 2


def to_triangle(matrix: Float64[Tensor, "k k"]) -> Float64[Tensor, " v"]:
    """The upper triangle of a symmetric matrix, off-diagonal · √2: its L2 norm is that of the matrix."""
    row, column = torch.triu_indices(len(matrix), len(matrix))
    return matrix[row, column] * torch.where(row == column, 1.0, math.sqrt(2.0))


def from_triangle(vector: Float64[Tensor, " v"], channels: int) -> Float64[Tensor, "k k"]:
    """Back from `to_triangle`."""
    row, column = torch.triu_indices(channels, channels)
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    matrix[row, column] = vector / torch.where(row == column, 1.0, math.sqrt(2.0))
    matrix[column, row] = matrix[row, column]
    return matrix


def patient_means(features: Float[Tensor, "b k"], patients: Sequence[str]) -> Float[Tensor, "n k"]:
    """Average over the scans of each patient, patients in order of first appearance."""
    order = {patient: row for row, patient in enumerate(dict.fromkeys(patients))}
    index = torch.tensor([order[patient] for patient in patients], device=features.device, dtype=torch.long)
    sums = torch.zeros(len(order), features.shape[1], dtype=features.dtype, device=features.device)
    scans = torch.bincount(index, minlength=len(order)).to(features.dtype)
    return sums.index_add(0, index, features) / scans[:, None]


def fit_erasure(
    means: Float[Tensor, "s k"], covariance: Float[Tensor, "k k"] | None = None
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "k k"]]:
    """Fit r(x) = mean + matrix (x - mean) from the sites' means; returns (mean, matrix).

    Content is moved as little as possible in the metric of `covariance`, shrunk a little towards the identity
    (LEACE, where it is the features' own); none: the identity. The site means coincide whatever it is.
    Raises `ValueError` with fewer than two sites, and for a covariance of nothing.
    """
    if len(means) < 2:
        raise ValueError(f"Expected means of at least two sites to erase between; got {len(means)}.")
    means = means.double()
    mean = means.mean(0)
    metric = torch.eye(len(mean), dtype=torch.float64)
    if covariance is not None:
        spread = covariance.double().diagonal().mean()
        if spread <= 0:
            raise ValueError("Expected content that varies between patients; its covariance is zero.")
        metric = (1 - _SHRINKAGE) * covariance.double() + _SHRINKAGE * spread * metric
    whiten, unwhiten = roots(metric)
    basis, size, _ = torch.linalg.svd(whiten @ (means - mean).T, full_matrices=False)
    basis = basis[:, (size > 1e-9 * size.max()) & (size > 1e-12)][:, : len(means) - 1]
    matrix = torch.eye(len(mean), dtype=torch.float64) - unwhiten @ basis @ basis.T @ whiten
    return mean, matrix


def erase(
    content: Float[Tensor, "*b k"], mean: Float[Tensor, " k"], matrix: Float[Tensor, "k k"]
) -> Float[Tensor, "*b k"]:
    """Apply a fitted erasure, in the dtype of `content`."""
    mean, matrix = mean.to(content), matrix.to(content)
    return mean + (content - mean) @ matrix.T


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse square root and square root of a covariance, both zero along directions that carry nothing."""
    values, vectors = torch.linalg.eigh(covariance)
    carries = values > 1e-10 * values.max()
    root = torch.where(carries, values.clamp(min=0).sqrt(), 0.0)
    inverse = torch.where(carries, 1 / root.clamp(min=1e-150), 0.0)
    return (vectors * inverse) @ vectors.T, (vectors * root) @ vectors.T
