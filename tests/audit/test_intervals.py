"""Intervals hold what they say, at the edges too; what so few cannot tell is None."""

import numpy as np
import pytest

from audit.statistics.guarantee import gaussian_epsilon, gaussian_sigma, largest_rate, largest_rate_of
from audit.statistics.intervals import area, area_interval, clopper_pearson, rate_at, smallest_told, wilson
from audit.statistics.one_run import ceiling, epsilon_lower, epsilon_of_pairs, p_value


def test_exact_and_score_intervals_of_shares() -> None:
    assert clopper_pearson(83, 83) == (pytest.approx(0.9565, abs=1e-4), 1.0)
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert wilson(40, 40)[0] == pytest.approx(0.9124, abs=1e-4)
    with pytest.raises(ValueError, match="at most 3"):
        clopper_pearson(4, 3)


def test_the_area_counts_ties_half() -> None:
    assert area(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == 0.875


@pytest.mark.parametrize(("n_in", "n_out"), [(8, 8), (20, 100), (126, 135)])
def test_intervals_of_areas_claim_nobodys_membership_as_often_as_they_say(n_in: int, n_out: int) -> None:
    draws = np.random.default_rng(0)
    least = smallest_told(n_in, n_out)
    assert area_interval(least + 1e-6, n_in, n_out)[0] > 0.5 > area_interval(least - 1e-6, n_in, n_out)[0]
    values = [area(draws.normal(size=n_in), draws.normal(size=n_out)) for _ in range(2000)]
    claimed = sum(value > least for value in values)
    assert clopper_pearson(claimed, 2000, 0.999)[0] <= 0.025  # false alarm of this test: 1 in 2000


def test_an_area_of_one_is_no_certainty() -> None:
    low, high = area_interval(1.0, 18, 106)
    assert 0.9 < low < 0.97 and high == 1.0
    assert smallest_told(126, 135) == pytest.approx(0.570, abs=1e-3)


def test_a_rate_at_few_false_alarms_needs_others() -> None:
    inside, outside = np.arange(100.0) + 50, np.arange(100.0)
    assert rate_at(inside, outside, 0.001) is None
    found = rate_at(inside, outside, 0.01)
    assert found is not None and found[0] == 0.51


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "bound"),
    [
        (100, 100, 100, 0.0, 3.49297),
        (100, 100, 100, 1e-5, 3.49022),
        (1000, 1000, 600, 1e-5, 0.29723),
        (1000, 100, 90, 1e-5, 1.62614),
        (1000, 10, 10, 0.0, 1.05187),
        (5000, 500, 400, 1e-5, 1.19522),
        (200, 200, 200, 1e-3, 3.56616),
        (200, 40, 40, 1e-3, 1.84424),
        (300, 60, 50, 1e-5, 1.01193),
    ],
)
def test_bounds_of_one_run_are_those_of_the_paper(m: int, r: int, v: int, delta: float, bound: float) -> None:
    assert epsilon_lower(m, r, v, delta) == pytest.approx(bound, abs=1e-5)


def test_what_so_few_canaries_can_show_has_a_ceiling() -> None:
    assert [round(ceiling(m), 3) for m in (32, 64, 200)] == [2.320, 3.036, 4.188]
    assert p_value(1000, 100, 75, 1.0, 1e-5) == pytest.approx(0.38450513, abs=1e-8)
    assert p_value(100, 50, 40, 0.5, 1e-3) == pytest.approx(0.01977752, abs=1e-8)


def test_pairs_bound_nothing_where_nothing_is_told_and_much_where_all_is() -> None:
    draws = np.random.default_rng(0)
    member, site = np.arange(400) < 200, np.zeros(400, int)
    claimed = sum(epsilon_of_pairs(draws.normal(size=400), member, site) > 0 for _ in range(200))
    assert claimed <= 18  # nominal 10 of 200
    assert epsilon_of_pairs(member + 0.0, member, site) > 1.5


def test_gaussian_curves_are_exact() -> None:
    assert gaussian_sigma(1.0, 1e-5) == pytest.approx(3.7306, abs=1e-4)
    assert gaussian_sigma(10.0, 1e-5) == pytest.approx(0.4999, abs=1e-4)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=1e-4)
    assert gaussian_epsilon(2.0, 1e-5) == pytest.approx(1.9931, abs=1e-4)


def test_the_largest_rate_that_any_attacker_can_have() -> None:
    import dp_accounting as dpa
    from dp_accounting import pld

    accountant = pld.PLDAccountant(dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dpa.PoissonSampledDpEvent(16 / 300, dpa.GaussianDpEvent(2))
    accountant.compose(dpa.SelfComposedDpEvent(step, 2000))
    rates = [largest_rate_of(f, accountant.get_delta) for f in (0.001, 0.01, 0.1)]
    assert rates == pytest.approx([0.0347, 0.1452, 0.4920], abs=1e-4)
    assert largest_rate(0.01, float("inf"), 0.0) == 1.0
    assert largest_rate(0.01, 0.0, 0.0) == pytest.approx(0.01)
