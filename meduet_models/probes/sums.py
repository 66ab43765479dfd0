"""Probes from sums: read across sites without a feature leaving any of them, equal to the pooled computation.

One law: a probe is fitted, and read, from sums that add; the pooled computation is the same with one site
that holds everybody. Each site deals its patients into folds and tells, per fold, count, sum and sum of outer
products of a joint vector (content, style, targets): `ErasureMoments`. From these follow in closed form

- the linear site probe of each fold, fitted on the other folds (linear discriminant, equal priors); its hits
  on a fold are counts, for which the sites are asked again;
- ridge regression of some coordinates on others, nested cross-validation included: the squared error on a
  fold is a quadratic form in that fold's sums. One exchange.

What this file does not do: it sends and bounds nothing (`client/exchanges/probes.py`, `erasure.py`).

Axes: f = folds, z = coordinates of the joint vector, k = those read from, t = those predicted, s = sites, b =
patients, p = penalties.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from meduet_models.erasure import ErasureMoments
from meduet_models.probes.anatomy import RIDGE_PENALTIES

FoldMoments = Sequence[ErasureMoments]
"""The sums of one site (or of all), fold by fold."""


def linear_probe_from_sums(
    moments: Mapping[str, ErasureMoments], shrinkage: float = 0.05
) -> tuple[Float64[Tensor, "k s"], Float64[Tensor, " s"]]:
    """The linear site probe of a federation, from the sites' sums alone: weight and bias, sites in mapping
    order.

    Linear discriminant with equal priors and the pooled within-site covariance (shrunk towards its mean
    variance). It equals the probe fitted on all features in one place: no feature needs to travel. Each site
    then counts its own hits on held-out scans with `read_site`.
    """
    if len(moments) < 2 or any(own.count < 1 for own in moments.values()):
        raise ValueError(f"Expected content sums of at least two sites with patients; got {len(moments)}.")
    means = torch.stack([own.total / own.count for own in moments.values()], dim=1)  # k s
    within = torch.stack(
        [
            own.outer / own.count - torch.outer(mean, mean)
            for own, mean in zip(moments.values(), means.T, strict=True)
        ]
    ).mean(0)
    spread = within.diagonal().mean().clamp(min=1e-12)
    within = (1 - shrinkage) * within + shrinkage * spread * torch.eye(len(means), dtype=torch.float64)
    weight = torch.linalg.lstsq(within, means, driver="gelsd").solution
    return weight, -0.5 * (means * weight).sum(0)


def read_site(
    features: Float[Tensor, "b k"], weight: Float[Tensor, "k s"], bias: Float[Tensor, " s"]
) -> Int[Tensor, " b"]:
    """The site that a linear probe reads from each feature vector."""
    return (features.to(weight) @ weight + bias).argmax(1)


def coordinates(moments: ErasureMoments, chosen: slice) -> ErasureMoments:
    """The sums of some coordinates of the joint vector."""
    return ErasureMoments(moments.count, moments.total[chosen], moments.outer[chosen, chosen], moments.bound)


def all_but(folds: FoldMoments, *left_out: int) -> ErasureMoments:
    """The sums of all folds except some."""
    kept = [fold for place, fold in enumerate(folds) if place not in left_out]
    return sum(kept[1:], start=kept[0])


def pooled_folds(sites: Mapping[str, FoldMoments]) -> list[ErasureMoments]:
    """Fold by fold, the sums of all sites together."""
    first, *others = sites.values()
    return [sum(same, start=fold) for fold, *same in zip(first, *others, strict=True)]


def site_probes_by_fold(
    sites: Mapping[str, FoldMoments], chosen: slice
) -> tuple[Float64[Tensor, "f k s"], Float64[Tensor, "f s"]]:
    """For each fold, the linear site probe fitted on the other folds, reading the coordinates `chosen`."""
    num_folds = len(next(iter(sites.values())))
    fitted = [
        linear_probe_from_sums({site: coordinates(all_but(own, fold), chosen) for site, own in sites.items()})
        for fold in range(num_folds)
    ]
    return torch.stack([weight for weight, _ in fitted]), torch.stack([bias for _, bias in fitted])


def site_hits(
    features: Float[Tensor, "b k"],
    folds: Int[Tensor, " b"],
    weight: Float[Tensor, "f k s"],
    bias: Float[Tensor, "f s"],
    site: int,
) -> int:
    """How many patients of `site` are read as its own, each by the probe that was fitted without her fold."""
    return sum(
        int((read_site(features[folds == fold], weight[fold], bias[fold]) == site).sum())
        for fold in range(len(weight))
    )


def explained_from_sums(
    folds: FoldMoments, source: slice, target: slice, together: bool = False
) -> Float64[Tensor, " t"]:
    """Out-of-fold R² of predicting the coordinates `target` from `source`, from fold sums alone.

    Nested: the penalty for a fold is chosen among `RIDGE_PENALTIES` by leaving out each other fold in turn;
    one for all targets when `together`. With `together` the answer is one number, variance-weighted. Equals
    `anatomy_probes.out_of_fold` on the patients' vectors. Raises `ValueError` with fewer than three folds.
    """
    if len(folds) < 3:
        raise ValueError(f"Expected sums of at least three folds to choose and to test; got {len(folds)}.")
    width = len(range(*target.indices(len(folds[0].total))))
    error, spread = torch.zeros(2, width, dtype=torch.float64)
    for test, fold in enumerate(folds):
        inner = [other for other in range(len(folds)) if other != test]
        wrong = torch.stack(
            [_errors(all_but(folds, test, other), folds[other], source, target) for other in inner]
        ).sum(0)  # p t
        if together:
            wrong = wrong.sum(1, keepdim=True).expand(-1, width)
        rest = all_but(folds, test)
        error += _errors(rest, fold, source, target).gather(0, wrong.argmin(0)[None])[0]
        mean = (rest.total / rest.count)[target]
        second = fold.outer.diagonal()[target]
        spread += second - 2 * mean * fold.total[target] + fold.count * mean.square()
    if together:
        error, spread = error.sum(0, keepdim=True), spread.sum(0, keepdim=True)
    return torch.where(spread > 1e-12, 1 - error / spread.clamp(min=1e-12), torch.nan)


def _errors(
    fitted: ErasureMoments, read: ErasureMoments, source: slice, target: slice
) -> Float64[Tensor, "p t"]:
    """Squared errors on `read` of ridge regressions fitted on `fitted`, one row per penalty."""
    mean = fitted.total / fitted.count
    spread = fitted.outer / fitted.count - torch.outer(mean, mean)
    deviation = spread.diagonal()[source].clamp(min=0).sqrt()
    varies = deviation > 1e-12
    scale = torch.where(varies, 1 / deviation.clamp(min=1e-12), 0.0) / varies.sum().clamp(min=1).sqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * spread[source, source] * scale)
    values = values.clamp(min=0)
    basis = scale[:, None] * vectors  # standardise, then rotate
    moment = basis.T @ spread[source, target]
    centred = (  # sums of (z - mean)(z - mean)ᵀ over those read, around the mean of those fitted
        read.outer
        - torch.outer(mean, read.total)
        - torch.outer(read.total, mean)
        + read.count * torch.outer(mean, mean)
    )
    inputs = basis.T @ centred[source, source] @ basis
    cross = basis.T @ centred[source, target]
    errors = []
    for penalty in RIDGE_PENALTIES:
        weight = moment / (values + penalty)[:, None]
        errors.append(
            centred.diagonal()[target] - 2 * (weight * cross).sum(0) + (weight * (inputs @ weight)).sum(0)
        )
    return torch.stack(errors)
