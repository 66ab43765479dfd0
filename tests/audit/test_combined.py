"""Scores of a model taken together: two weak ones say more as one, and weighing claims nobody."""

import numpy as np
import torch

from audit.attacks.combined import combined, judged_together, weighs
from audit.attacks.scores import FEWEST, Scores, judged
from audit.cohort import Cohort
from tests.audit.released import latents

IN, ALL = 120, 300


def cohort(site: str, n: int = ALL // 2) -> Cohort:
    people = tuple(f"p{one}" for one in range(n))
    return Cohort(site, torch.zeros(n, 1, 1, 1, 1), people, tuple(one < IN // 2 for one in range(n)))


COHORTS = [cohort("north"), cohort("south")]
MEMBER = np.concatenate([one.member for one in COHORTS])
SITE = np.repeat([0, 1], ALL // 2)


def scores(*values: np.ndarray) -> list[Scores]:
    return [Scores(one, MEMBER, SITE) for one in values]


def nothing(seed: int) -> Scores:
    return Scores(np.random.default_rng(seed).normal(size=ALL), MEMBER, SITE)


def test_two_weak_scores_with_the_same_error_tell_together_what_neither_tells_alone() -> None:
    draws = np.random.default_rng(0)
    error = draws.normal(size=ALL)
    own = scores(0.3 * MEMBER + error, 0.3 * MEMBER - error + 0.3 * draws.normal(size=ALL))
    alone = [judged("m", "loss", one, "").value or 0 for one in own]
    together = judged_together("m", own, COHORTS, nothing(1))
    assert together is not None
    (finding, told) = together
    assert max(alone) < 0.65 and finding.verdict == "found" and (finding.value or 0) > 0.85
    assert len(told.values) == finding.n_in + finding.n_out == int((~weighs(COHORTS)).sum())


def test_who_weighs_is_not_judged_and_a_hash_deals_alike_whoever_else_is_there() -> None:
    fits = weighs(COHORTS)
    assert 0.4 < fits.mean() < 0.6
    assert (weighs([cohort("north", 80)]) == fits[:80]).all()
    assert len(combined(scores(np.ones(ALL), np.arange(ALL)), fits).values) == (~fits).sum()


def test_scores_of_nobody_are_claimed_as_seldom_as_said_though_weighing_the_judged_would_claim_many() -> None:
    fits, apart, together = weighs(COHORTS), 0, 0
    for seed in range(100):
        own = scores(*np.random.default_rng(seed).normal(size=(8, ALL)))
        apart += judged("m", "combined", combined(own, fits), "").verdict == "found"
        x = np.stack([one.values for one in own], 1)
        weight = np.linalg.lstsq(x, MEMBER - MEMBER.mean(), rcond=None)[0]
        together += judged("m", "combined", Scores(x @ weight, MEMBER, SITE), "").verdict == "found"
    assert apart <= 9 and together > 60  # nominal 2.5 of 100; 10 or more: once in 3000


def test_members_who_differ_without_a_model_void_the_sum_and_few_are_not_weighed() -> None:
    shifted = Scores(MEMBER + np.random.default_rng(2).normal(size=ALL), MEMBER, SITE)
    own = scores(shifted.values, np.random.default_rng(3).normal(size=ALL))
    together = judged_together("m", own, COHORTS, shifted)
    assert together is not None and together[0].verdict == "void" and together[0].epsilon_low is None
    few = [Cohort("north", latents(30, 0), tuple(map(str, range(30))), (True,) * 15 + (False,) * 15)]
    half = Scores(np.zeros(30), few[0].member, np.zeros(30, int))
    assert FEWEST > 15 and judged_together("m", [half, half], few, half) is None
    assert judged_together("m", own[:1], COHORTS, shifted) is None
