"""Downstream metrics: what a prediction is worth, per patient, with an interval over patients.

Overlap and distances are MONAI's, the AUC is scikit-learn's; here they are brought to one number per patient,
and resampled by patient. What has no value (no voxel of a class in truth or prediction, a resample with one
class only) is left out and counted, never replaced.

Axes: b = scans, D H W = voxels.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks.utils import one_hot
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

_LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric on some patients, with its interval."""

    value: float
    """NaN where no patient has one."""
    low: float
    high: float
    """Percentile interval of the bootstrap over patients, 95%."""
    undefined: int
    """Patients without a value."""


def segmentation_values(
    predicted: Int64[Tensor, "b 1 D H W"],
    truth: Int64[Tensor, "b 1 D H W"],
    *,
    classes: int,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> dict[str, Floats]:
    """`dice`, `surface_dice` (within `tolerance_mm`) and `hd95` (mm) of each scan: mean over the foreground
    classes that have a value, NaN where none has.

    A class that is in truth but not predicted has Dice 0, surface Dice 0, and no distance.
    """
    p, t = one_hot(predicted, classes), one_hot(truth, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MONAI's, of empty classes: they are counted here
        warnings.filterwarnings("ignore", "monai.*always_return_as_numpy", FutureWarning)  # MONAI's own call
        dice = compute_dice(p, t, include_background=False)
        surface = compute_surface_dice(p, t, [tolerance_mm] * (classes - 1), spacing=spacing_mm)
        hd95 = compute_hausdorff_distance(p, t, percentile=95, spacing=spacing_mm)
    absent = t[:, 1:].flatten(2).sum(2) == 0  # b class
    surface = torch.where(absent, torch.nan, surface.nan_to_num(nan=0.0))
    return {
        name: _mean_of_finite(values.double().numpy())
        for name, values in {"dice": dice, "surface_dice": surface, "hd95": hd95}.items()
    }


def per_patient(values: Floats, patients: Sequence[str]) -> Floats:
    """The mean over each patient's scans, in alphabetical order of the patients."""
    names = np.array(patients)
    return np.array([_mean_of_finite(values[None, names == name])[0] for name in sorted(set(patients))])


def mean_estimate(values: Floats, resamples: int, seed: int) -> Estimate:
    """The mean over patients that have a value, and its bootstrap interval."""
    kept = values[np.isfinite(values)]
    undefined = len(values) - len(kept)
    if not len(kept):
        return Estimate(np.nan, np.nan, np.nan, undefined)
    low, high = bootstrap(len(kept), lambda rows: float(kept[rows].mean()), resamples, seed)
    return Estimate(float(kept.mean()), low, high, undefined)


def auc_estimate(
    probabilities: Float[Tensor, "b classes"],
    target: Int64[Tensor, " b"],
    patients: Sequence[str],
    resamples: int,
    seed: int,
) -> Estimate:
    """Area under the ROC curve (of class 1; with more classes the mean of each against the rest).

    Patients are resampled with all their scans. NaN where the scans are of one class only.
    """
    names = np.array(patients)
    rows_of = [np.flatnonzero(names == name) for name in sorted(set(patients))]
    scores, truth = probabilities.double().numpy(), target.numpy()

    def auc(chosen: NDArray[np.int64]) -> float:
        rows = np.concatenate([rows_of[i] for i in chosen])
        return _auc(scores[rows], truth[rows])

    value = auc(np.arange(len(rows_of)))
    if not np.isfinite(value):
        return Estimate(np.nan, np.nan, np.nan, len(rows_of))
    return Estimate(value, *bootstrap(len(rows_of), auc, resamples, seed), 0)


def bootstrap(
    count: int, statistic: Callable[[NDArray[np.int64]], float], resamples: int, seed: int
) -> tuple[float, float]:
    """The 95% percentile interval of `statistic` over resamples of `count` patients, with replacement."""
    generator = np.random.default_rng(seed)
    values = np.array([statistic(generator.integers(count, size=count)) for _ in range(resamples)])
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def estimates(
    values: Mapping[str, Floats], patients: Sequence[str], resamples: int, seed: int
) -> dict[str, Estimate]:
    """Values of scans as estimates over patients."""
    return {name: mean_estimate(per_patient(own, patients), resamples, seed) for name, own in values.items()}


def _auc(scores: Floats, truth: NDArray[np.int64]) -> float:
    present = np.unique(truth)
    if len(present) < 2:
        return float("nan")
    if scores.shape[1] == 2:
        return float(roc_auc_score(truth, scores[:, 1]))
    return float(np.mean([roc_auc_score(truth == one, scores[:, one]) for one in present]))


def _mean_of_finite(values: Floats) -> Floats:
    """Mean over the last axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    sums, counts = np.where(finite, values, 0.0).sum(-1), finite.sum(-1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
