import math

import pytest

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
