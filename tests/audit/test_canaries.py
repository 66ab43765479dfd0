"""Canaries accuse no mechanism that keeps its promise more often than they say, and find what breaks it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from audit.attacks.canaries import judged_coins
from audit.books import Charged
from audit.evidence import Release
from audit.planted import _GAUSSIAN, _HALVED, _RARE, _STEPS
from audit.statistics.guarantee import gaussian_epsilon
from audit.statistics.honest_canaries import (
    expected_lower,
    told,
    told_with_known_draws,
    told_with_noise_twice,
)
from audit.statistics.intervals import clopper_pearson
from audit.statistics.one_run import Guesses, epsilon_lower, epsilon_lower_gaussian
from privacy.accounting import Mechanism, epsilon_of

Told = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def above(scores: Told, promised: float, canaries: int, audits: int, gaussian: bool) -> int:
    """In how many audits the bound is above the promise."""
    accused = 0
    for seed in range(audits):
        generator = np.random.default_rng(seed)
        coins = generator.random(canaries) < 0.5
        accused += Guesses.of(scores(coins, generator), coins).lower(gaussian=gaussian) > promised
    return accused


def test_the_mechanisms_are_of_the_epsilons_that_are_said() -> None:
    assert gaussian_epsilon(_GAUSSIAN.noise_multiplier, 1e-5) == pytest.approx(3.0, abs=2e-3)
    for steps in (_STEPS, _RARE):
        assert 0.9 < epsilon_of([steps], 1e-5).upper <= 1.0


@pytest.mark.parametrize(("canaries", "audits"), [(20, 200), (100, 200), (1000, 20)])
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(("mechanism", "promised"), [(_GAUSSIAN, 3.0), (_STEPS, 1.0)])
def test_a_correct_mechanism_is_accused_no_more_often_than_nominal(
    mechanism: Mechanism, promised: float, gaussian: bool, canaries: int, audits: int
) -> None:
    accused = above(partial(told, mechanism), promised, canaries, audits, gaussian)
    assert clopper_pearson(accused, audits)[0] <= 0.05


@pytest.mark.parametrize("gaussian", [False, True])
def test_where_nothing_reaches_the_attacker_a_claim_is_rarer_than_nominal(gaussian: bool) -> None:
    nothing = partial(told, Mechanism(noise_multiplier=1e9))
    accused = above(nothing, 0.0, 100, 300, gaussian)
    assert 0 < accused <= 15  # of 300 at 5%: and it can claim at all


@pytest.mark.parametrize(
    ("scores", "promised", "gaussian"),
    [
        (partial(told, _HALVED), 3.0, True),
        (partial(told, _GAUSSIAN, length=2.6), 3.0, True),
        (partial(told_with_noise_twice, _STEPS), 1.0, False),
        (partial(told_with_known_draws, _RARE), 1.0, False),
    ],
)
def test_each_planted_fault_is_found_in_nine_of_ten_audits(
    scores: Told, promised: float, gaussian: bool
) -> None:
    assert above(scores, promised, 1500, 10, gaussian) >= 9


def test_the_numbers_of_guesses_are_fixed_and_each_has_its_part_of_the_level() -> None:
    generator = np.random.default_rng(0)
    coins = generator.random(1000) < 0.5
    guesses = Guesses.of(np.where(coins, 1.0, -1.0) * generator.random(1000), coins)
    assert [r for r, _ in guesses.tried] == [50, 110, 220, 470, 1000]
    assert all(v == r for r, v in guesses.tried[:-1])
    assert guesses.ceiling() == epsilon_lower(1000, 1000, 1000, level=0.01) == pytest.approx(5.3156, abs=1e-4)
    assert guesses.lower() <= guesses.ceiling() < guesses.lower(gaussian=True)
    assert [r for r, _ in Guesses.of(np.zeros(3), coins[:3]).tried] == [2]
    with pytest.raises(ValueError, match="at least two canaries; got 1"):
        Guesses.of(np.zeros(1), coins[:1])


def test_who_guesses_all_the_other_way_round_shows_nothing() -> None:
    coins = np.arange(100) % 2 == 0
    assert Guesses.of(-1.0 * coins, coins).lower() == 0.0


def test_what_a_correct_mechanism_shows_on_average_is_far_below_its_promise() -> None:
    sharp = Mechanism(noise_multiplier=1.0)  # 4.377
    assert expected_lower(sharp, 1000) == pytest.approx(1.5, abs=0.15)
    assert expected_lower(sharp, 1000, gaussian=True) == pytest.approx(2.1, abs=0.2)
    assert expected_lower(sharp, 8, gaussian=True) < 0.2


def test_the_bound_of_the_gaussian_family_is_below_what_was_guessed_from_it() -> None:
    """Phi(1 / 2) = 0.691 of all guesses are right where outputs lie one deviation apart: epsilon 4.377."""
    assert 0.5 < epsilon_lower_gaussian(1000, 1000, 691) < 4.377


def test_half_the_noise_is_found_where_everybody_is_in_every_step_and_the_right_noise_is_not() -> None:
    """Steps that all are in are one Gaussian mechanism; where steps are drawn, to say so is an assumption."""
    right = Mechanism(noise_multiplier=6.6, steps=20)
    promise = Charged(epsilon_of([right], 1e-5).upper, 1e-5)
    left = [Release("north", {"kind": "private_round", "round": 1}, None)]

    def verdicts(noise: float, judged_as: Mechanism) -> list[str]:
        made = []
        for seed in range(10):
            generator = np.random.default_rng(seed)
            coins = generator.random(1000) < 0.5
            scores = told(replace(right, noise_multiplier=noise), coins, generator)
            made.append(judged_coins(left, "steps", scores, coins, judged_as, promise, 0.05).verdict)
        return made

    assert verdicts(3.3, right).count("found") >= 7  # of 20 audits 17 were
    assert verdicts(6.6, right).count("found") == 0
    assert verdicts(3.3, replace(right, sampling_rate=0.5)).count("found") == 0
