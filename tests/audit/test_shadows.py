"""Models retrained without a candidate tell her membership; of a model that learned nobody, nothing."""

import numpy as np
import pytest

from audit.attacks.shadows import Losses, best_share, ranked, ratios
from audit.statistics.intervals import area


def world(shadows: int, learned: float, seed: int = 0, n: int = 240) -> tuple[Losses, np.ndarray]:
    """Scans of very different hardness; a model's loss is lower by `learned` on whom it was trained on."""
    draws = np.random.default_rng(seed)
    hard, member = draws.uniform(0.5, 2.0, n), draws.random(n) < 0.5
    without = draws.random((shadows, n)) < 0.5

    def loss(outside: np.ndarray) -> np.ndarray:
        return hard - learned * ~outside + draws.normal(0, 0.03, n)

    retrained = np.stack([loss(one) for one in without])
    return Losses(loss(~member), retrained, without, np.arange(n) % 3), member


def found(shadows: int, learned: float) -> tuple[float, float]:
    """Area of the loss alone, and beside retrained models."""
    told, member = world(shadows, learned)
    values = ratios(told.published, told.retrained, told.without, best_share(told))
    known = ~np.isnan(values)
    scores = ranked(values[known], member[known], told.site[known])
    inside = member[known]
    return area(-told.published[member], -told.published[~member]), area(scores[inside], scores[~inside])


@pytest.mark.parametrize("shadows", [1, 2, 4])
def test_what_a_loss_does_not_tell_retrained_models_do(shadows: int) -> None:
    plain, beside = found(shadows, learned=0.1)
    assert plain < 0.65 and beside > 0.9


@pytest.mark.parametrize("shadows", [1, 4])
def test_of_a_model_that_learned_nobody_they_tell_nothing(shadows: int) -> None:
    assert abs(found(shadows, learned=0.0)[1] - 0.5) < 0.13  # false alarm 1 in 1000


def test_who_is_in_every_retrained_model_is_left_out_and_said_to_be() -> None:
    told, _ = world(shadows=1, learned=0.1)
    values = ratios(told.published, told.retrained, told.without, 1.0)
    assert np.array_equal(np.isnan(values), ~told.without[0])


def test_a_candidate_is_ranked_among_the_others_of_her_own_site() -> None:
    values = np.array([5.0, 1.0, 2.0, 50.0, 60.0])
    member, site = np.array([True, False, False, False, False]), np.array([0, 0, 0, 1, 1])
    assert ranked(values, member, site).tolist() == [1.0, 0.5, 1.0, 0.5, 1.0]
