"""Downstream metrics against values computed by hand."""

import numpy as np
import pytest
import torch

from simulations.downstream.metrics import (
    auc_estimate,
    bootstrap,
    mean_estimate,
    per_patient,
    segmentation_values,
)


def cube(start: int, label: int = 1, edge: int = 4) -> torch.Tensor:
    volume = torch.zeros(1, 1, 12, 12, 12, dtype=torch.long)
    volume[0, 0, start : start + edge, 4 : 4 + edge, 4 : 4 + edge] = label
    return volume


def values(predicted: torch.Tensor, truth: torch.Tensor, **changes: object) -> dict[str, float]:
    settings = {"classes": 2, "spacing_mm": (1.0, 1.0, 1.0), "tolerance_mm": 1.0} | changes
    found = segmentation_values(predicted, truth, **settings)  # type: ignore[arg-type]
    return {name: float(own[0]) for name, own in found.items()}


def test_a_cube_shifted_by_a_voxel() -> None:
    found = values(cube(4), cube(5))
    assert found["dice"] == pytest.approx(2 * 48 / 128)
    assert found["surface_dice"] == 1.0  # every surface voxel lies within 1 mm of the other surface
    assert found["hd95"] == pytest.approx(1.0)
    strict = values(cube(4), cube(5), tolerance_mm=0.5)
    assert 0 < strict["surface_dice"] < 1


def test_distances_are_in_millimetres() -> None:
    assert values(cube(4), cube(5), spacing_mm=(3.0, 1.0, 1.0))["hd95"] == pytest.approx(3.0)
    assert values(cube(4), cube(5), spacing_mm=(3.0, 1.0, 1.0))["surface_dice"] < 1
    assert values(cube(3), cube(5))["hd95"] == pytest.approx(2.0)


def test_a_perfect_answer() -> None:
    assert values(cube(4), cube(4)) == {"dice": 1.0, "surface_dice": 1.0, "hd95": 0.0}


def test_a_missed_class_has_no_overlap_and_no_distance() -> None:
    found = values(torch.zeros_like(cube(4)), cube(4))
    assert (found["dice"], found["surface_dice"]) == (0.0, 0.0)
    assert np.isnan(found["hd95"])


def test_a_class_that_is_not_there_has_no_value() -> None:
    nothing = values(torch.zeros_like(cube(4)), torch.zeros_like(cube(4)))
    assert all(np.isnan(value) for value in nothing.values())
    one_of_two = values(cube(4), cube(5), classes=3)
    assert one_of_two["dice"] == pytest.approx(0.75)


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


def test_the_area_under_the_curve() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    target = torch.tensor([0, 0, 1, 1])
    estimate = auc_estimate(probabilities, target, ["a", "b", "c", "d"], 200, 0)
    assert estimate.value == pytest.approx(0.75)
    assert estimate.low <= 0.75 <= estimate.high
    alone = auc_estimate(probabilities[:2], target[:2], ["a", "b"], 200, 0)
    assert np.isnan(alone.value)
    assert alone.undefined == 2
    three = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    assert auc_estimate(three, torch.tensor([0, 1, 2, 0]), ["a", "b", "c", "d"], 50, 0).value == 1.0
