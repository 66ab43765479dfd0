"""Ridge and logistic regression in closed form: what a frozen model, and every baseline, is read with.

A fit is a `LinearMap`. Features are centred and standardised on the rows that are fitted, and divided by the
root of their number, so that an alpha means the same at every width. Alpha is chosen by leaving out patients
(no row of a patient is on both sides, standardisation is made inside the fold), or by generalised
cross-validation where every row is a patient of her own. Fits of many groups (a ridge for each position of a
grid) are made at once. `ridge_from_sums` is the same fit from fold sums that add over sites.

What this file does not do: it measures nothing (`anatomy.py`, `simulations/downstream/`) and sends nothing.
Sources: generalised cross-validation, Golub, Heath and Wahba 1979; multinomial logistic regression by
Newton's method, Hastie, Tibshirani and Friedman 2009, section 4.4.

Axes: g = groups, b = rows (scans), k = features, t = targets or classes, r = rank, a = alphas.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from meduet_models.erasure import ErasureMoments
from meduet_models.probes.cross_validation import FOLDS, patient_folds
from meduet_models.probes.sums import FoldMoments, all_but

ALPHAS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Penalties beside a mean squared error or cross-entropy; strongest first, which wins between equals."""
_CHOOSABLE = 3
"""Patients below which nothing can be left out: alpha is then the middle one."""
_NEWTON_STEPS, _HALVINGS, _SETTLED = 30, 20, 1e-10
_INTERCEPT = 1e-8  # softmax does not see a number that is added to all logits
_NEVER = -30.0  # logit of a class that was not seen


@dataclass(frozen=True)
class LinearMap:
    """Features to numbers, or to logits of classes."""

    mean: Float64[Tensor, "*g 1 k"]
    """Of the rows fitted."""
    rotate: Float64[Tensor, "*g k r"]
    """Standardisation, and the rotation into the span of the rows fitted: small where features are many."""
    shrunk: Float64[Tensor, "*g r t"]
    """Weights there."""
    bias: Float64[Tensor, "*g 1 t"]
    """What the mean row is mapped to."""
    alpha: Float64[Tensor, "*g t"]
    """Penalty chosen."""

    def __call__(self, features: Float[Tensor, "*g b k"]) -> Float64[Tensor, "*g b t"]:
        """The numbers, or logits, of each row."""
        return ((features.double() - self.mean) @ self.rotate) @ self.shrunk + self.bias

    @property
    def weight(self) -> Float64[Tensor, "*g k t"]:
        """Weights of the features as they are."""
        return self.rotate @ self.shrunk


def fit_ridge(
    features: Float[Tensor, "*g b k"],
    targets: Float[Tensor, "*g b t"],
    patients: Sequence[str],
    *,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
    choice: Literal["folds", "generalised"] = "folds",
    each: bool = False,
) -> LinearMap:
    """Ridge regression: mean squared error + alpha · ‖standardised weights‖², the intercept free.

    `patients` names the patient of each row, the same in every group. One alpha for all groups and targets,
    or for `each` its own. `choice="generalised"` needs no folds, and takes rows for independent. With fewer
    than three patients nothing is chosen: alpha is the middle one of `alphas`. Raises `ValueError` without
    rows, for rows without a patient, and for numbers that are not finite.
    """
    x, y = _rows(features, patients), targets.double()
    if not bool(torch.isfinite(y).all()):
        raise ValueError("Expected finite targets to fit; got NaN or infinity.")
    whole = _Basis.of(x)
    if len(set(patients)) < _CHOOSABLE:
        wrong = None
    elif choice == "generalised":
        wrong = _generalised(whole, y, alphas)
    else:
        wrong = torch.zeros(len(alphas), *y.shape[:-2], y.shape[-1], dtype=torch.float64)
        for train, test in _splits(patients, seed):
            basis = _Basis.of(x[..., train, :])
            mean = y[..., train, :].mean(-2, keepdim=True)
            unseen, left = basis.rotated(x[..., test, :]), y[..., test, :] - mean
            for place, own in enumerate(basis.weights(y[..., train, :], alphas)):
                wrong[place] += (left - unseen @ own).square().sum(-2)
    chosen = _chosen(wrong, alphas, (*y.shape[:-2], y.shape[-1]), each)
    return LinearMap(
        mean=whole.mean,
        rotate=whole.rotate,
        shrunk=whole.shrunk(y, chosen),
        bias=y.mean(-2, keepdim=True),
        alpha=chosen,
    )


def fit_logistic(
    features: Float[Tensor, "b k"],
    labels: Int64[Tensor, " b"],
    classes: int,
    patients: Sequence[str],
    *,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
) -> LinearMap:
    """Multinomial logistic regression: mean cross-entropy + alpha / 2 · ‖standardised weights‖², intercepts
    free; gives logits.

    Alpha has the least cross-entropy on patients left out, folds dealt within classes. A class without rows
    is never told. With fewer than three patients alpha is the middle one. Raises `ValueError` as `fit_ridge`,
    and for labels outside the classes.
    """
    x = _rows(features, patients)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"Expected labels from 0 to {classes - 1}; got {low} to {high}.")
    best = alphas[len(alphas) // 2]
    if len(set(patients)) >= _CHOOSABLE:
        wrong = torch.zeros(len(alphas), dtype=torch.float64)
        for train, test in _splits(patients, seed, labels.tolist()):
            basis = _Basis.of(x[train])
            unseen = basis.rotated(x[test])
            for place, (weight, bias) in enumerate(_logistic_path(basis.z, labels[train], classes, alphas)):
                wrong[place] += F.cross_entropy(unseen @ weight + bias, labels[test], reduction="sum")
        best = alphas[int(wrong.argmin())]
    whole = _Basis.of(x)
    ((weight, bias),) = _logistic_path(whole.z, labels, classes, (best,))
    alpha = torch.full((classes,), best, dtype=torch.float64)
    return LinearMap(whole.mean, whole.rotate, weight, bias[None], alpha)


def ridge_from_sums(
    folds: FoldMoments, source: slice, target: slice, *, alphas: Sequence[float] = ALPHAS, each: bool = False
) -> LinearMap:
    """`fit_ridge` of the coordinates `target` on `source`, from fold sums alone, of one site or of all.

    Equals the fit on the patients' vectors with these folds. With fewer than three folds alpha is the middle
    one. Raises `ValueError` when the sums hold no patient.
    """
    whole = all_but(folds)
    if float(whole.count) < 1:
        raise ValueError("Expected sums of at least one patient to fit; got none.")
    width = len(range(*target.indices(len(whole.total))))
    wrong = None
    if len(folds) >= _CHOOSABLE:
        wrong = torch.zeros(len(alphas), width, dtype=torch.float64)
        for place, read in enumerate(folds):
            rotate, power, moment, mean = _basis_of_sums(all_but(folds, place), source, target)
            around = (
                read.outer
                - torch.outer(mean, read.total)
                - torch.outer(read.total, mean)
                + read.count * torch.outer(mean, mean)
            )
            for rank, alpha in enumerate(alphas):
                weight = rotate @ (moment / (power[:, None] + alpha))
                wrong[rank] += around.diagonal()[target] - 2 * (weight * around[source, target]).sum(0)
                wrong[rank] += (weight * (around[source, source] @ weight)).sum(0)
    chosen = _chosen(wrong, alphas, (width,), each)
    rotate, power, moment, mean = _basis_of_sums(whole, source, target)
    shrunk = moment / (power[:, None] + chosen)
    return LinearMap(mean[None, source], rotate, shrunk, mean[None, target], chosen)


@dataclass(frozen=True)
class _Basis:
    """Rows standardised and rotated so that their columns are orthogonal; a zero column carries nothing."""

    mean: Float64[Tensor, "*g 1 k"]
    rotate: Float64[Tensor, "*g k r"]
    z: Float64[Tensor, "*g b r"]
    power: Float64[Tensor, "*g r"]
    """Mean square of each column."""

    @staticmethod
    def of(x: Float64[Tensor, "*g b k"]) -> "_Basis":
        """In the span of the rows or of the features, whichever is smaller."""
        count, width = x.shape[-2:]
        mean = x.mean(-2, keepdim=True)
        scale = _scale(x.std(-2, correction=0))
        seen = (x - mean) * scale.unsqueeze(-2)
        if width <= count:
            power, vectors = torch.linalg.eigh(seen.mT @ seen / count)
            return _Basis(mean, scale.unsqueeze(-1) * vectors, seen @ vectors, power.clamp(min=0))
        power, rows = torch.linalg.eigh(seen @ seen.mT / count)
        carries = power > 1e-12 * power.amax(-1, keepdim=True).clamp(min=1e-12)
        power = torch.where(carries, power, 0.0)
        length = (power * count).sqrt()
        inverse = torch.where(carries, 1 / length.clamp(min=1e-150), 0.0)
        rotate = scale.unsqueeze(-1) * (seen.mT @ rows) * inverse.unsqueeze(-2)
        return _Basis(mean, rotate, rows * length.unsqueeze(-2), power)

    def rotated(self, x: Float64[Tensor, "*g b k"]) -> Float64[Tensor, "*g b r"]:
        """Other rows in this basis."""
        return (x - self.mean) @ self.rotate

    def shrunk(
        self, y: Float64[Tensor, "*g b t"], alpha: Float64[Tensor, "*g t"]
    ) -> Float64[Tensor, "*g r t"]:
        """Ridge weights in this basis, with an alpha for each target."""
        moment = self.z.mT @ (y - y.mean(-2, keepdim=True)) / y.shape[-2]
        return moment / (self.power.unsqueeze(-1) + alpha.unsqueeze(-2))

    def weights(self, y: Float64[Tensor, "*g b t"], alphas: Sequence[float]) -> Iterator[Tensor]:
        """Ridge weights in this basis for every alpha, [*g r t] each, one after the other."""
        moment = self.z.mT @ (y - y.mean(-2, keepdim=True)) / y.shape[-2]
        for alpha in alphas:
            yield moment / (self.power.unsqueeze(-1) + alpha)


def _rows(features: Tensor, patients: Sequence[str]) -> Tensor:
    if not len(patients) or features.shape[-2] != len(patients):
        raise ValueError(
            f"Expected one patient for each row, and rows to fit; got {features.shape[-2]} rows and "
            f"{len(patients)} patients."
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("Expected finite features to fit; got NaN or infinity.")
    return features.double()


def _scale(deviation: Tensor) -> Tensor:
    """1 / deviation over the root of how many features vary; 0 for those that do not."""
    varies = deviation > 1e-12
    number = varies.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(varies, 1 / deviation.clamp(min=1e-12), 0.0) / number.sqrt()


def _splits(
    patients: Sequence[str], seed: int, strata: Sequence[int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Rows fitted and rows read, fold by fold."""
    folds = torch.from_numpy(patient_folds(patients, seed, FOLDS, strata))
    return [
        ((folds != fold).nonzero()[:, 0], (folds == fold).nonzero()[:, 0])
        for fold in range(int(folds.max()) + 1)
    ]


def _generalised(basis: _Basis, y: Tensor, alphas: Sequence[float]) -> Tensor:
    """Generalised cross-validation's error for every alpha, [a *g t]."""
    count = y.shape[-2]
    left = y - y.mean(-2, keepdim=True)
    errors = []
    for alpha, weight in zip(alphas, basis.weights(y, alphas), strict=True):
        freedom = 1 + (basis.power / (basis.power + alpha)).sum(-1, keepdim=True)  # the intercept's one
        residual = (left - basis.z @ weight).square().mean(-2)
        errors.append(residual / (1 - freedom / count).clamp(min=1e-6).square())
    return torch.stack(errors)


def _chosen(
    wrong: Tensor | None, alphas: Sequence[float], shape: tuple[int, ...], each: bool
) -> Float64[Tensor, "*g t"]:
    """The alpha of every target: of least error, its own or of all together."""
    values = torch.tensor(alphas, dtype=torch.float64)
    if wrong is None:
        return values[len(alphas) // 2].expand(shape)
    if each:
        return values[wrong.argmin(0)]
    return values[wrong.flatten(1).sum(1).argmin()].expand(shape)


def _basis_of_sums(
    sums: ErasureMoments, source: slice, target: slice
) -> tuple[Float64[Tensor, "k r"], Float64[Tensor, " r"], Float64[Tensor, "r t"], Float64[Tensor, " z"]]:
    """What `_Basis` has (rotation, power), the moments of the targets in it, and the mean of everything."""
    mean = sums.total / sums.count
    spread = sums.outer / sums.count - torch.outer(mean, mean)
    scale = _scale(spread.diagonal()[source].clamp(min=0).sqrt())
    power, vectors = torch.linalg.eigh(scale[:, None] * spread[source, source] * scale)
    rotate = scale[:, None] * vectors
    return rotate, power.clamp(min=0), rotate.T @ spread[source, target], mean


def _logistic_path(
    z: Float64[Tensor, "b r"], labels: Int64[Tensor, " b"], classes: int, alphas: Sequence[float]
) -> list[tuple[Float64[Tensor, "r t"], Float64[Tensor, " t"]]]:
    """Weights and intercepts for each alpha, every fit started from the one before."""
    present, places = torch.unique(labels, return_inverse=True)
    target = F.one_hot(places, len(present)).double()
    ones = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], dim=1)  # b r+1
    fit = torch.zeros(ones.shape[1], len(present), dtype=torch.float64)
    fit[-1] = target.mean(0).log()
    found = []
    for alpha in alphas:
        fit = _newton(ones, target, fit, alpha)
        weight = torch.zeros(z.shape[1], classes, dtype=torch.float64)
        bias = torch.full((classes,), _NEVER, dtype=torch.float64)
        weight[:, present], bias[present] = fit[:-1], fit[-1] - fit[-1].mean()
        found.append((weight, bias))
    return found


def _newton(x: Tensor, target: Tensor, start: Tensor, alpha: float) -> Tensor:
    """The minimum of mean cross-entropy + alpha / 2 · ‖all rows but the last‖², from `start`."""
    count, (width, classes) = len(x), start.shape
    penalty = torch.full((width, 1), alpha, dtype=torch.float64)
    penalty[-1] = _INTERCEPT

    def loss(fit: Tensor) -> float:
        entropy = -(target * F.log_softmax(x @ fit, dim=1)).sum() / count
        return float(entropy + (penalty * fit.square()).sum() / 2)

    fit, value = start, loss(start)
    for _ in range(_NEWTON_STEPS):
        share = (x @ fit).softmax(1)  # b t
        slope = x.T @ (share - target) / count + penalty * fit  # r+1 t
        curve = share[:, :, None] * (torch.eye(classes, dtype=torch.float64) - share[:, None])  # b t t
        bend = torch.einsum("bi,btu,bj->itju", x, curve, x).reshape(width * classes, -1) / count
        bend += penalty.expand(-1, classes).flatten().diag()
        step = torch.linalg.solve(bend, slope.flatten()).reshape(width, classes)
        gain = float((step * slope).sum())
        if not math.isfinite(gain) or gain < _SETTLED:
            break
        for halving in range(_HALVINGS):
            ahead = fit - step * 0.5**halving
            if (new := loss(ahead)) < value:
                fit, value = ahead, new
                break
        else:
            break
    return fit
