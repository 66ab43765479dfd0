import math

import pytest

from privacy.accounting import Mechanism
from privacy.promise import Promise


def test_a_promise_without_noise_says_that_epsilon_is_infinite() -> None:
    promise = Promise(kind="round", bound=2.5, unit="site update", enforcement="clip")
    assert promise.epsilon.lower == promise.epsilon.upper == math.inf
    assert "at most 2.5" in promise.sentence()
    assert "not differentially private" in promise.sentence()


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_promise_without_a_real_bound_cannot_be_made(bound: float) -> None:
    with pytest.raises(ValueError, match="finite bound"):
        Promise(kind="round", bound=bound, unit="site update", enforcement="clip")


def test_noise_in_steps_says_how_many_and_by_which_chance() -> None:
    taken = Mechanism(noise_multiplier=4.5, sampling_rate=0.1, steps=5)
    promise = Promise(
        kind="private_round", bound=0.5, unit="patient", enforcement="steps", mechanism=taken, delta=1e-5
    )
    assert promise.noise_in == "steps" and promise.deviation == 2.25
    for words in (
        "moves the sum of a training step, of which there are 5 and in each of which she is with a chance of "
        "0.1, by at most 0.5",
        "noise of deviation 2.25",
        "Not covered",
    ):
        assert words in promise.sentence()
    assert Promise.from_record(promise.record()) == promise


@pytest.mark.parametrize("unit", ["patient", "site update"])
def test_steps_without_noise_are_no_promise(unit: str) -> None:
    with pytest.raises(ValueError, match="and in steps always"):
        Promise(kind="private_round", bound=0.5, unit=unit, enforcement="steps")  # type: ignore[arg-type]
