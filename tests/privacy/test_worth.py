import math

import pytest

from privacy.accounting import Mechanism
from privacy.worth import DROWNED, LITTLE, signal_to_noise

STEPS = Mechanism(noise_multiplier=0.936, sampling_rate=0.1, steps=100)


def test_the_designs_numbers_sixty_patients_a_site_are_drowned_and_2400_are_not() -> None:
    weights = 519_482
    assert signal_to_noise(STEPS, [60.0] * 3, weights) < DROWNED / 5
    assert signal_to_noise(STEPS, [60.0] * 3, 5_900) == pytest.approx(0.145, abs=0.005)
    assert signal_to_noise(STEPS, [2_400.0] * 3, weights) == pytest.approx(0.616, abs=0.001)
    assert signal_to_noise(STEPS, [10_000.0] * 3, weights, coherence=0.5) > LITTLE


def test_it_grows_with_patients_and_coherence_and_falls_with_noise_and_the_root_of_weights() -> None:
    one = signal_to_noise(STEPS, [100.0, 50.0], 10_000)
    assert signal_to_noise(STEPS, [200.0, 100.0], 10_000) == pytest.approx(2 * one)
    assert signal_to_noise(STEPS, [100.0, 50.0], 40_000) == pytest.approx(one / 2)
    assert signal_to_noise(STEPS, [100.0, 50.0], 10_000, 0.25) == pytest.approx(one / 4)
    assert signal_to_noise(STEPS, [75.0], 10_000) == pytest.approx(one / math.sqrt(2))


def test_a_code_whose_noise_told_fewer_than_nobody_adds_no_signal() -> None:
    assert signal_to_noise(STEPS, [100.0, -20.0], 10_000) == signal_to_noise(STEPS, [100.0, 0.0], 10_000)
