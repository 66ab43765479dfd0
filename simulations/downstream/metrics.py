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


@dataclass(frozen=True)
class Resampled:
    """A metric, averaged over draws of labelled patients, on test patients and on resamples of them."""

    value: float
    """NaN where there is none."""
    low: float
    high: float
    undefined: int
    """Patients without a value in every draw."""
    spread: float
    """Standard deviation over the draws; 0 of one."""
    resamples: tuple[float, ...]
    """The value on each resample of the test patients, the same resamples for every network."""


def resampled(
    draws: Sequence[Floats | Statistic], patients: Sequence[str], resamples: int, seed: int
) -> Resampled:
    """Average a metric over draws; the interval is over test patients, resampled with all their scans."""
    names = np.array(patients)
    rows_of = [np.flatnonzero(names == name) for name in sorted(set(patients))]
    per_draw = [_of_patients(own, patients, rows_of) for own in draws]
    everybody = np.arange(len(rows_of))
    values = np.array([of(everybody) for of in per_draw])
    generator = np.random.default_rng(seed)
    chosen = [generator.integers(len(rows_of), size=len(rows_of)) for _ in range(resamples)]
    of_draws = np.array([[of(own) for own in chosen] for of in per_draw]).reshape(len(draws), -1)
    averaged = mean_of_finite(of_draws.T)
    finite = averaged[np.isfinite(averaged)]
    low, high = np.quantile(finite, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]) if len(finite) else (np.nan, np.nan)
    alone = [not any(np.isfinite(of(np.array([i]))) for of in per_draw) for i in everybody]
    undefined = sum(alone) if not any(callable(own) for own in draws) else 0
    value = float(mean_of_finite(values[None])[0])
    if not np.isfinite(value):
        return Resampled(np.nan, np.nan, np.nan, len(rows_of), 0.0, tuple(averaged.tolist()))
    spread = float(np.nanstd(values)) if len(values) > 1 else 0.0
    return Resampled(value, float(low), float(high), undefined, spread, tuple(averaged.tolist()))


def value_on(own: Floats | Statistic, patients: Sequence[str], rows: Sequence[int]) -> float:
    """The metric on some scans: the mean over their patients, or the number of all of them."""
    chosen = np.array(rows, dtype=np.int64)
    if callable(own):
        return own(chosen)
    return float(mean_of_finite(per_patient(own[chosen], [patients[row] for row in rows])[None])[0])


def _of_patients(
    own: Floats | Statistic, patients: Sequence[str], rows_of: Sequence[NDArray[np.int64]]
) -> Callable[[NDArray[np.int64]], float]:
    """From places of patients (alphabetical) to the metric on them."""
    if callable(own):
        statistic = own
        return lambda chosen: statistic(np.concatenate([rows_of[i] for i in chosen]))
    values = per_patient(own, patients)
    return lambda chosen: float(mean_of_finite(values[None, chosen])[0])


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
