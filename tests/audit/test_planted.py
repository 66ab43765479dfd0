"""Every planted fault is found and nobody sound accused; the mechanism audit is as sharp as it says."""

import numpy as np
import pytest

from audit.planted import FAULTS, SOUND, planted
from audit.statistics.mechanisms import Bound, audit_mechanism, epsilon_between


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert FAULTS[name]()


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_piece_is_not_accused(name: str) -> None:
    assert not SOUND[name]()


def test_the_report_counts_them() -> None:
    count = planted()
    assert (count.found, count.accused, count.missed) == (len(FAULTS), 0, ())
    assert count.faults >= 13


def test_the_gaussian_mechanism_is_audited_to_within_a_tenth() -> None:
    def gaussian(rows: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
        noise: np.ndarray = generator.normal(size=(draws, 3))
        return noise + np.clip(rows, -1, 1).sum(0)

    bounds = [audit_mechanism(gaussian, np.array([100.0, 0, 0]), 4.3772, seed=seed) for seed in range(3)]
    assert all(3.9 < one.epsilon <= 4.3772 for one in bounds)
    assert not any(one.contradicts for one in bounds)
    few = audit_mechanism(gaussian, np.array([100.0, 0, 0]), 4.3772, draws=10_000)
    assert 3.0 < few.epsilon < 4.1


def test_outputs_that_never_overlap_have_no_epsilon() -> None:
    assert epsilon_between(np.zeros(100), np.ones(100)) == float("inf")
    assert Bound(float("inf"), 8.0).contradicts
    generator = np.random.default_rng(0)
    assert epsilon_between(generator.normal(size=10_000), generator.normal(size=10_000)) < 0.1
