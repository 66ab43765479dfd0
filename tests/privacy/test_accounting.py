"""Constants: design notes on privacy (dp-accounting 0.6, RDP, tf-privacy), and the exact Gaussian."""

import math
import time
from typing import Any

import dp_accounting as dpa
import pytest
import torch
from dp_accounting import rdp

from privacy import accounting
from privacy.accounting import (
    Epsilon,
    Mechanism,
    check_multiplier,
    epsilon_of,
    gaussian_delta,
    gaussian_multiplier,
    is_within,
    step_multiplier,
)


def taken(noise: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism(noise_multiplier=noise, sampling_rate=rate, steps=steps)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "pld"),
    [
        (256 / 60000, 1.1, 14062, 1e-5, 2.3817),
        (0.01, 1.0, 1000, 1e-5, 1.8282),
        (16 / 300, 1.0, 2000, 1e-3, 13.7022),
        (16 / 300, 2.0, 2000, 1e-3, 4.2777),
        (1.0, 10.0, 50, 1e-5, 2.9432),
        (1.0, 1.0, 1, 1e-5, 4.3772),
        (1.0, 2.0, 1, 1e-5, 1.9931),
        (4 / 75, 2.0, 1000, 1e-5, 3.98),
    ],
)
def test_the_constants_of_the_design_to_the_digits_given(
    rate: float, noise: float, steps: int, delta: float, pld: float
) -> None:
    digits = len(str(pld).partition(".")[2])
    assert round(epsilon_of([taken(noise, rate, steps)], delta).upper, digits) == pld


@pytest.mark.parametrize(
    ("epsilon", "steps", "noise"),
    [
        (8, 1000, 2.061),
        (3, 1000, 4.505),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(8, 25, 0.709), (8, 100, 0.938), (3, 25, 1.154), (3, 100, 1.675)]
        ),
    ],
)
def test_noise_of_sampled_steps_is_what_the_design_says_within_a_hundredth(
    epsilon: float, steps: int, noise: float
) -> None:
    assert epsilon_of([taken(noise * 1.01, 0.1, steps)], 1e-5).upper < epsilon
    assert epsilon_of([taken(noise * 0.99, 0.1, steps)], 1e-5).upper > epsilon


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "expected"),
    [(0.01, 1.0, 1000, 1e-5, 2.1014), (16 / 300, 2.0, 2000, 1e-3, 4.8197), (1.0, 10.0, 50, 1e-5, 3.1890)],
)
def test_the_cross_check_by_renyi_lies_above_and_is_what_it_was(
    rate: float, noise: float, steps: int, delta: float, expected: float
) -> None:
    event = dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(rate, dpa.GaussianDpEvent(noise)), steps)
    renyi = rdp.RdpAccountant().compose(event).get_epsilon(delta)
    assert renyi == pytest.approx(expected, abs=1e-4)
    assert epsilon_of([taken(noise, rate, steps)], delta).upper < renyi


def test_a_ledger_of_three_events_is_far_below_the_sum_of_its_parts() -> None:
    events = [taken(2.0, 16 / 300, 2000), taken(3.0), taken(5.0)]
    together = epsilon_of(events, 1e-3).upper
    assert together == pytest.approx(4.5188, abs=1e-4)
    assert together < sum(epsilon_of([event], 1e-3).upper for event in events)


@pytest.mark.parametrize(
    ("epsilon", "delta", "noise"),
    [(1.0, 1e-5, 3.7306), (1.0, 1e-6, 4.2247), (5.0, 1e-5, 0.8919), (10.0, 1e-5, 0.4999)],
)
def test_the_multiplier_of_one_release_is_the_exact_one_rounded_up(
    epsilon: float, delta: float, noise: float
) -> None:
    multiplier = gaussian_multiplier(epsilon, delta)
    assert noise - 1e-4 < multiplier <= noise + 2e-4
    assert epsilon_of([taken(multiplier)], delta).upper <= epsilon
    assert gaussian_delta(multiplier, epsilon) <= delta < gaussian_delta(multiplier - 3e-4, epsilon)


@pytest.mark.parametrize("mechanism", [taken(3.7307), taken(0.6003), taken(2.0, 0.1, 40)])
def test_the_interval_holds_the_exact_value_and_is_narrow(mechanism: Mechanism) -> None:
    interval = epsilon_of([mechanism], 1e-5)
    assert interval.lower <= interval.upper < interval.lower + 0.01
    if mechanism.sampling_rate == 1:
        assert gaussian_delta(mechanism.noise_multiplier, interval.lower) >= 1e-5 - 1e-9
        assert gaussian_delta(mechanism.noise_multiplier, interval.upper) <= 1e-5 + 1e-9


def test_what_is_not_noised_makes_the_total_infinite_and_nothing_costs_nothing() -> None:
    assert epsilon_of([taken(2.0), None], 1e-5).upper == math.inf
    assert str(epsilon_of([None], 1e-5)) == "infinite"
    assert epsilon_of([], 1e-5) == Epsilon(0.0, 0.0)


def test_ten_thousand_equal_events_are_composed_by_their_number() -> None:
    epsilon_of([taken(1.0)], 1e-5)  # the library is loaded once
    began = time.perf_counter()
    many = epsilon_of([taken(400.0)] * 10_000, 1e-5)
    assert time.perf_counter() - began < 2.0
    assert many.upper == pytest.approx(epsilon_of([taken(4.0)], 1e-5).upper, abs=1e-2)


def test_steps_and_mechanisms_are_the_same_thing() -> None:
    assert epsilon_of([taken(5.0, 0.1, 30)], 1e-5) == epsilon_of([taken(5.0, 0.1, 10)] * 3, 1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier > 0; got 0.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier > 0"),
        ({"noise_multiplier": 1.0, "sampling_rate": 1.5}, r"sampling_rate in \(0, 1\]; got 1.5"),
        ({"noise_multiplier": 1.0, "sampling_rate": 0.0}, "sampling_rate"),
        ({"noise_multiplier": 1.0, "steps": 0}, "steps >= 1"),
    ],
)
def test_a_mechanism_that_hides_nobody_is_refused(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Mechanism(**settings)  # type: ignore[arg-type]


def test_a_mechanism_comes_back_from_the_books_and_nothing_else_does() -> None:
    mechanism = taken(1.5, 0.1, 7)
    assert Mechanism.from_record(mechanism.record()) == mechanism
    for odd in ({}, {**mechanism.record(), "more": 1}, {**mechanism.record(), "steps": True}, [], "gaussian"):
        with pytest.raises(ValueError, match="Expected"):
            Mechanism.from_record(odd)


@pytest.mark.parametrize(
    ("epsilon", "steps", "noise"),
    [
        (3.0, 1000, 4.505),
        *(
            pytest.param(epsilon, steps, noise, marks=pytest.mark.slow)
            for epsilon, steps, noise in [
                (8.0, 25, 0.709),
                (8.0, 100, 0.938),
                (8.0, 1000, 2.061),
                (3.0, 25, 1.154),
                (3.0, 100, 1.675),
            ]
        ),
    ],
)
def test_the_least_noise_of_sampled_steps_is_the_designs_within_a_hundredth(
    epsilon: float, steps: int, noise: float
) -> None:
    assert step_multiplier(epsilon, 1e-5, 0.1, steps) == pytest.approx(noise, rel=0.01)


def test_steps_and_what_is_released_beside_them_cost_the_epsilon_together_and_not_less() -> None:
    beside = (taken(gaussian_multiplier(1.0, 1e-5)),)
    noise = step_multiplier(3.0, 1e-5, 0.1, 400, beside)
    assert noise > step_multiplier(3.0, 1e-5, 0.1, 400)
    assert epsilon_of([*beside, taken(noise, 0.1, 400)], 1e-5).upper <= 3.0
    assert epsilon_of([*beside, taken(0.999 * noise, 0.1, 400)], 1e-5).upper > 3.0


def test_nothing_is_left_for_steps_beside_a_release_that_costs_as_much() -> None:
    with pytest.raises(ValueError, match="beside the steps to cost less than 1"):
        step_multiplier(1.0, 1e-5, 0.1, 10, (taken(gaussian_multiplier(1.5, 1e-5)),))


def test_noise_that_was_found_elsewhere_is_checked_by_one_composition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (taken(gaussian_multiplier(1.0, 1e-5)),)
    noise = step_multiplier(3.0, 1e-5, 0.1, 400, code)
    composed: list[float] = []
    estimate = accounting._estimate

    def counted(counts: Any, delta: float, pessimistic: bool, interval: float = 1e-4) -> float:
        composed.append(interval)
        return estimate(counts, delta, pessimistic, interval)

    monkeypatch.setattr(accounting, "_estimate", counted)
    check_multiplier.cache_clear()
    check_multiplier(noise, 3.0, 1e-5, 0.1, 400, code)
    assert set(composed) == {1e-3} and len(composed) <= 2  # the quick grid, one composition for each end


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (0.99, "at most epsilon 3; with noise_multiplier=.* they cost 3.0"),
        (0.5, "at most epsilon 3; with noise_multiplier=.* they cost"),
        (1.05, "no larger than epsilon 3 asks for; with noise_multiplier=.* the steps cost 2.8"),
        (0.0, "the plan holds none"),
    ],
)
def test_noise_that_is_too_little_or_needless_is_refused(share: float, sentence: str) -> None:
    noise = step_multiplier(3.0, 1e-5, 0.1, 400)
    with pytest.raises(ValueError, match=sentence):
        check_multiplier(noise * share, 3.0, 1e-5, 0.1, 400)


def test_the_quick_estimate_lets_nothing_pass_that_what_is_charged_would_not() -> None:
    for steps in ([taken(1.0, 0.2, 30)], [taken(4.5, 0.1, 1000)], [taken(0.8, 0.1, 9), taken(1.4)]):
        charged = epsilon_of(steps, 1e-5).upper
        assert is_within(steps, charged, 1e-5) and not is_within(steps, charged - 1e-4, 1e-5)
        assert charged <= accounting._estimate(accounting._counted(steps), 1e-5, True, 1e-3) < charged + 5e-3


# A patient replaced by another


def replaced(noise: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism(noise_multiplier=noise, sampling_rate=rate, steps=steps, relation="replace one")


def test_replacing_a_patient_costs_what_the_design_says_and_up_to_twice_as_much() -> None:
    there, other = (epsilon_of([kind(1.0, 0.01, 1000)], 1e-5).upper for kind in (taken, replaced))
    assert round(there, 2) == 1.83 and round(other, 2) == 2.84
    halved = epsilon_of([taken(0.5, 0.01, 1000)], 1e-5).upper  # a valid bound, and a loose one
    assert round(halved, 2) == 13.36
    for rate, steps, noise, times in ((0.1, 1000, 4.5, 2.17), (0.1, 60, 2.0, 1.81), (1.0, 1, 1.391, 2.24)):
        ratio = epsilon_of([replaced(noise, rate, steps)], 1e-5).upper
        ratio /= epsilon_of([taken(noise, rate, steps)], 1e-5).upper
        assert ratio == pytest.approx(times, abs=0.02)


def test_without_sampling_it_is_twice_the_noise() -> None:
    assert gaussian_multiplier(3.0, 1e-5, "replace one") == pytest.approx(
        2 * gaussian_multiplier(3.0, 1e-5), abs=3e-4
    )
    other, there = epsilon_of([replaced(4.0)], 1e-5), epsilon_of([taken(2.0)], 1e-5)
    assert other.upper == pytest.approx(there.upper, abs=1e-3)


def test_beside_a_replaced_patient_everything_counts_as_such() -> None:
    mixed = epsilon_of([taken(3.0), replaced(2.0, 0.1, 50)], 1e-5)
    assert mixed == epsilon_of([replaced(3.0), replaced(2.0, 0.1, 50)], 1e-5)
    assert mixed.upper > epsilon_of([taken(3.0), taken(2.0, 0.1, 50)], 1e-5).upper
    noise = step_multiplier(3.0, 1e-5, 0.1, 100, (replaced(gaussian_multiplier(1.0, 1e-5, "replace one")),))
    assert noise > 1.5 * step_multiplier(3.0, 1e-5, 0.1, 100, (taken(gaussian_multiplier(1.0, 1e-5)),))


def test_no_two_patients_within_the_bound_are_told_apart_better_than_two_opposite_ones() -> None:
    """By quadrature in the plane of the two shares: what the accountant takes for the worst pair is."""
    noise, rate = 0.8, 0.2
    line = torch.linspace(-7.0, 7.0, 561, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="ij")
    cell = float(line[1] - line[0]) ** 2

    def density(share: tuple[float, float]) -> torch.Tensor:
        def normal(a: float, b: float) -> torch.Tensor:
            return ((-((x - a) ** 2) - (y - b) ** 2) / (2 * noise**2)).exp() / (2 * math.pi * noise**2)

        return (1 - rate) * normal(0.0, 0.0) + rate * normal(*share)

    shares = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.0), (-0.6, 0.8)]
    densities = [density(share) for share in shares]
    for epsilon in (0.2, 0.7, 1.5):
        deltas = {
            (i, j): float((one - math.exp(epsilon) * other).clamp(min=0).sum()) * cell
            for i, one in enumerate(densities)
            for j, other in enumerate(densities)
            if i != j
        }
        worst = deltas[0, 1]
        assert all(delta <= worst + 1e-9 for delta in deltas.values())
        whole = accounting._of_one_step(replaced(noise, rate), True, 1e-4)
        assert worst == pytest.approx(whole.get_delta_for_epsilon(epsilon), rel=2e-3)


def test_a_replaced_patient_comes_back_from_the_books() -> None:
    assert Mechanism.from_record(replaced(1.5, 0.1, 7).record()) == replaced(1.5, 0.1, 7)
    assert "relation" not in taken(1.5).record()
    with pytest.raises(ValueError, match="Expected a mechanism"):
        Mechanism.from_record({**taken(1.5).record(), "relation": "swap all"})
