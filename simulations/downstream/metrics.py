"""Downstream estimates: what a prediction is worth over patients, with an interval.

What is measured of scans is the task's (`meduet_models/downstream/`); here it is brought to one number per
patient, and resampled by patient. What has no value (no voxel of a class in truth or prediction, a resample
with one class only) is left out and counted, never replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meduet_models.downstream.task import Floats, Statistic, mean_of_finite

_LEVEL = 0.95


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


def per_patient(values: Floats, patients: Sequence[str]) -> Floats:
    """The mean over each patient's scans, in alphabetical order of the patients."""
    names = np.array(patients)
    return np.array([mean_of_finite(values[None, names == name])[0] for name in sorted(set(patients))])


def mean_estimate(values: Floats, resamples: int, seed: int) -> Estimate:
    """The mean over patients that have a value, and its bootstrap interval."""
    kept = values[np.isfinite(values)]
    undefined = len(values) - len(kept)
    if not len(kept):
        return Estimate(np.nan, np.nan, np.nan, undefined)
    low, high = bootstrap(len(kept), lambda rows: float(kept[rows].mean()), resamples, seed)
    return Estimate(float(kept.mean()), low, high, undefined)


def statistic_estimate(statistic: Statistic, patients: Sequence[str], resamples: int, seed: int) -> Estimate:
    """A number of all scans, and its interval: patients are resampled with all their scans.

    NaN where the scans have no such number (those of one class only, say).
    """
    names = np.array(patients)
    rows_of = [np.flatnonzero(names == name) for name in sorted(set(patients))]

    def of(chosen: NDArray[np.int64]) -> float:
        return statistic(np.concatenate([rows_of[i] for i in chosen]))

    value = of(np.arange(len(rows_of)))
    if not np.isfinite(value):
        return Estimate(np.nan, np.nan, np.nan, len(rows_of))
    return Estimate(value, *bootstrap(len(rows_of), of, resamples, seed), 0)


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
    measured: Mapping[str, Floats | Statistic], patients: Sequence[str], resamples: int, seed: int
) -> dict[str, Estimate]:
    """What a task measured, as estimates over patients."""
    return {
        name: statistic_estimate(own, patients, resamples, seed)
        if callable(own)
        else mean_estimate(per_patient(own, patients), resamples, seed)
        for name, own in measured.items()
    }
