"""Above or not: paired by patient, said in words, and withdrawn where no scan is needed."""

import numpy as np
import pytest

from simulations.downstream.comparisons import Comparison, Measured, compare, sentences, withdrawn


def measured(value: float, noise: np.ndarray, labels: str = "5", draws: int = 20) -> Measured:
    own = tuple((value + noise).tolist())
    return Measured(
        task="segmentation", metric="Dice", test="seen", labels=labels, who="ours", draws=draws, value=value,
        resamples=own, first_draws=1, first_value=value - 0.1, first_resamples=tuple(np.array(own) - 0.1),
    )  # fmt: skip


def test_a_difference_is_paired_and_so_narrower_than_either() -> None:
    patients = np.random.default_rng(0).normal(0, 0.05, size=400)
    small = np.random.default_rng(1).normal(0, 0.002, size=400)
    one = compare(measured(0.65, patients + small), measured(0.64, patients), "label_map")
    assert one.above and one.high - one.low < 0.02 < np.quantile(patients, 0.975)
    assert one.difference == pytest.approx(0.01)


def test_fewer_draws_are_compared_with_the_same_draws() -> None:
    noise = np.zeros(10)
    few, many = measured(0.6, noise, draws=1), measured(0.65, noise)
    assert compare(few, many, "ridge").difference == pytest.approx(0.5 - 0.55)


def test_other_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="same resamples"):
        compare(measured(0.6, np.zeros(10)), measured(0.6, np.zeros(11)), "ridge")


def comparison(rival: str, labels: str, low: float) -> Comparison:
    return Comparison(
        task="segmentation", metric="Dice", test="seen", labels=labels, who="FedMeDUET, frozen", rival=rival,
        difference=low + 0.01, low=low, high=low + 0.02,
    )  # fmt: skip


def test_what_is_not_above_is_said_first_by_label_count_and_dice_without_a_scan_is_withdrawn() -> None:
    below = [comparison("label_map", "10", 0.0), comparison("label_map", "2", -0.01)]
    first, second = sentences([*below, comparison("ridge", "2", 0.01)])
    assert first.startswith("FedMeDUET, frozen is not above the mean training label, which reads no scan")
    assert first.index("2:") < first.index("10:") and "ridge" not in first
    assert "withdrawn" in second
    assert withdrawn(below) == {
        ("segmentation", "Dice", "seen", labels, "FedMeDUET, frozen") for labels in ("2", "10")
    }
    (fine,) = sentences([comparison("label_map", "2", 0.001)])
    assert "above every yardstick" in fine
