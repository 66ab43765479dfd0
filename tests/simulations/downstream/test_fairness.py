"""FairnessScore: what spread costs, and who is grouped how."""

import math

import pytest

from simulations.downstream.fairness import age_band, fairness_score, groups_of


def test_equal_groups_keep_the_metric_and_spread_lowers_it_whatever_its_sign() -> None:
    assert fairness_score(0.8, [0.8, 0.8, 0.8]) == pytest.approx(0.8)
    assert fairness_score(0.8, [0.6, 1.0]) == pytest.approx(0.8 / 1.2)
    assert fairness_score(-0.5, [-0.9, -0.1]) < -0.5
    assert math.isnan(fairness_score(0.8, [0.8]))


def test_ages_fall_into_bands_and_what_nobody_knows_is_no_grouping() -> None:
    assert [age_band(age) for age in (20, 39.9, 40, 59, 60)] == [
        "under 40", "under 40", "40 to 60", "40 to 60", "60 and over",
    ]  # fmt: skip
    assert groups_of([{"age": 30.0}, {}]) == {"age": ("under 40", "")}
    assert groups_of([{"sex": "F"}])["sex"] == ("F",)
