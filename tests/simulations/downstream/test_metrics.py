"""Estimates over patients: what counts once, what has no value, how sure."""

import numpy as np

from simulations.downstream.metrics import (
    bootstrap,
    mean_estimate,
    per_patient,
    statistic_estimate,
)


def test_what_has_no_value_is_left_out_and_counted() -> None:
    estimate = mean_estimate(np.array([1.0, np.nan, 3.0]), 50, 0)
    assert (estimate.value, estimate.undefined) == (2.0, 1)
    assert 1.0 <= estimate.low <= estimate.high <= 3.0
    assert np.isnan(mean_estimate(np.array([np.nan]), 50, 0).value)


def test_scans_of_a_patient_count_once() -> None:
    assert per_patient(np.array([1.0, 3.0, 7.0]), ["b", "b", "a"]).tolist() == [7.0, 2.0]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = rng.normal(0.7, 0.1, size=40)
        estimate = mean_estimate(sample, 300, trial)
        covered += estimate.low <= 0.7 <= estimate.high
    # percentile intervals of 40 cover about 93.5%; fewer than 176 of 200 comes by chance once in 1,000
    assert covered >= 176
    assert covered < 200


def test_a_bootstrap_reproduces_by_its_seed() -> None:
    sample = np.random.default_rng(1).normal(size=30)
    intervals = [bootstrap(30, lambda rows: float(sample[rows].mean()), 100, seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_a_number_of_all_scans_is_resampled_by_patient() -> None:
    values = np.array([0.0, 0.0, 1.0, 1.0])
    spread = lambda rows: float(values[rows].std()) if len(set(values[rows])) > 1 else float("nan")  # noqa: E731
    estimate = statistic_estimate(spread, ["a", "a", "b", "b"], 100, 0)
    assert estimate.value == estimate.low == estimate.high == 0.5  # resamples of one patient alone have none
    assert statistic_estimate(lambda rows: float("nan"), ["a", "b"], 10, 0).undefined == 2
