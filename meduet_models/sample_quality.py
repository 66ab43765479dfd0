"""Sample quality: how far generated scans are from real ones, from feature vectors of both.

Fréchet distance and kernel distance compare distributions; precision, recall, density and coverage say which
side is missing something; distances to the nearest neighbour show copies. What this file does not do: it
makes no features (`random_features.py`, or an encoder), draws nobody, and gives no interval
(`simulations/generation/quality.py`).

Few scans: the Fréchet distance grows with features over scans, so use fewer features than half the scans
(`principal_axes`) and read it beside the same distance between real scans; the kernel distance is unbiased.

Axes: r = real scans, g = generated scans, k = features, a = principal axes.
Sources: Fréchet inception distance (arXiv:1706.08500); kernel distance (arXiv:1801.01401); improved precision
and recall (arXiv:1904.06991); density and coverage (arXiv:2002.09797).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

_SMALLEST = 1e-12


@dataclass(frozen=True)
class PrincipalAxes:
    """Features standardised and turned to the axes along which real scans differ most."""

    mean: Float64[Tensor, " k"]
    deviation: Float64[Tensor, " k"]
    axes: Float64[Tensor, "k a"]
    """Orthogonal columns of one length, by falling variance: real scans vary by 1 per axis on average."""

    def __call__(self, features: Float[Tensor, "b k"]) -> Float64[Tensor, "b a"]:
        """Coordinates of these scans."""
        return (features.detach().cpu().double() - self.mean) / self.deviation @ self.axes


def principal_axes(real: Float[Tensor, "r k"], count: int) -> PrincipalAxes:
    """At most `count` axes, fitted on real scans. Raises `ValueError` below two scans or one axis."""
    if len(real) < 2 or count < 1:
        raise ValueError(f"Expected two real scans and one axis or more; got {len(real)} and {count}.")
    values = real.detach().cpu().double()
    mean, deviation = values.mean(0), values.std(0)
    deviation = torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, torch.ones_like(deviation))
    _, strengths, axes = torch.linalg.svd((values - mean) / deviation, full_matrices=False)
    rank = int((strengths > 1e-9 * strengths[0].clamp(min=_SMALLEST)).sum())
    kept = max(1, min(count, rank))
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # an axis has no direction: choose one
    scale = (strengths[:kept].square().mean() / (len(real) - 1)).clamp(min=_SMALLEST).sqrt()
    return PrincipalAxes(mean, deviation, (axes * signs)[:kept].T / scale)


def frechet_distance(real: Float[Tensor, "r k"], generated: Float[Tensor, "g k"]) -> float:
    """Squared Fréchet distance of the Gaussians with these means and covariances; 0 for equal ones.

    Raises `ValueError` for fewer than two scans on a side.
    """
    _check_two(real, generated)
    x, y = real.detach().double(), generated.detach().double()
    a, b = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    between = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * between
    return float(distance.clamp(min=0))


def kernel_distance(
    real: Float[Tensor, "r k"],
    generated: Float[Tensor, "g k"],
    real_weight: Float[Tensor, " r"] | None = None,
    generated_weight: Float[Tensor, " g"] | None = None,
) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y / k + 1)³, unbiased: about 0, and below it by
    chance, for equal distributions.

    Weights are how often a scan is counted (a bootstrap); a scan is never compared with itself. Raises
    `ValueError` for fewer than two scans on a side.
    """
    _check_two(real, generated)
    x, y = real.detach().double(), generated.detach().double()
    u = torch.ones(len(x), dtype=x.dtype) if real_weight is None else real_weight.double()
    v = torch.ones(len(y), dtype=x.dtype) if generated_weight is None else generated_weight.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    return float(
        mean_of_pairs(kernel(x, x), u)
        + mean_of_pairs(kernel(y, y), v)
        - 2 * (u @ kernel(x, y) @ v) / (u.sum() * v.sum())
    )


def mean_of_pairs(values: Float[Tensor, "n n"], weight: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean of a symmetric table over pairs of different members, each counted `weight` times."""
    off = values - torch.diag(values.diagonal())
    return (weight @ off @ weight) / (weight.sum().square() - weight.square().sum()).clamp(min=_SMALLEST)


@dataclass(frozen=True)
class Neighbourhoods:
    """Per scan, so that intervals come from resampling scans."""

    precise: Bool[Tensor, " g"]
    """Whether a generated scan lies among the real ones; its mean is the precision."""
    recalled: Bool[Tensor, " r"]
    """Whether a real scan lies among the generated ones; its mean is the recall."""
    density: Float64[Tensor, " g"]
    """In how many real neighbourhoods a generated scan lies, over `neighbours`; the mean may exceed 1."""
    covered: Bool[Tensor, " r"]
    """Whether a real scan's neighbourhood holds a generated scan; its mean is the coverage."""


def neighbourhoods(
    real: Float[Tensor, "r k"], generated: Float[Tensor, "g k"], neighbours: int = 3
) -> Neighbourhoods:
    """Improved precision and recall, density and coverage, with balls that reach to the `neighbours`-th
    neighbour on the same side.

    Raises `ValueError` unless both sides have more scans than that.
    """
    if min(len(real), len(generated)) <= neighbours or neighbours < 1:
        raise ValueError(
            f"Expected more than {neighbours} scans on both sides and one neighbour or more; got {len(real)} "
            f"real and {len(generated)} generated ones."
        )
    x, y = real.detach().double(), generated.detach().double()
    across = _distances(x, y)  # r g
    real_radius, generated_radius = _radius(x, neighbours), _radius(y, neighbours)
    in_real = across <= real_radius[:, None]
    return Neighbourhoods(
        precise=in_real.any(0),
        recalled=(across <= generated_radius).any(1),
        density=in_real.double().sum(0) / neighbours,
        covered=across.min(1).values <= real_radius,
    )


def nearest(
    scans: Float[Tensor, "b k"], others: Float[Tensor, "n k"]
) -> tuple[Float64[Tensor, " b"], Int[Tensor, " b"]]:
    """Distance of each scan to the nearest of others, and which one that is."""
    if not len(others):
        raise ValueError("Expected at least one scan to be near to; got none.")
    found = _distances(scans.detach().double(), others.detach().double()).min(1)
    return found.values, found.indices


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, from differences: no cancellation between scans that are nearly the same."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radius(values: Tensor, neighbours: int) -> Tensor:
    own = _distances(values, values).fill_diagonal_(0)
    return own.kthvalue(neighbours + 1, dim=1).values  # the nearest is the scan itself


def _check_two(real: Tensor, generated: Tensor) -> None:
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"Expected at least two scans on both sides; got {len(real)} and {len(generated)}.")
