"""Scores into findings: what may be claimed, what is void, and how often nobody's membership is claimed."""

import numpy as np

from audit.attacks.scores import Scores, blind_from, false_alarms, judged
from audit.findings import Finding
from audit.statistics.intervals import clopper_pearson


def scores(shift: float, n_in: int = 60, n_out: int = 60, seed: int = 0) -> Scores:
    draws = np.random.default_rng(seed)
    member = np.arange(n_in + n_out) < n_in
    return Scores(draws.normal(size=n_in + n_out) + shift * member, member, np.zeros(n_in + n_out, int))


def finding(own: Scores, blind: Scores | None = None) -> Finding:
    return judged("a: b", "loss", own, "Somebody asks.", blind)


def test_a_score_that_tells_is_found_with_its_interval_and_bound() -> None:
    found = finding(scores(2.0))
    assert found.verdict == "found" and found.low is not None and found.low > 0.8
    assert found.epsilon_low is not None and found.epsilon_low > 0.3
    assert found.true_positive_rate is None  # one in a hundred needs a hundred others
    assert finding(scores(2.0, n_out=100)).true_positive_rate is not None


def test_a_score_that_tells_nothing_says_what_it_could_have_found() -> None:
    nothing = finding(scores(0.0, 200, 200))
    assert nothing.verdict == "not found" and nothing.ceiling is not None and nothing.ceiling < 0.6
    assert finding(scores(0.0, 30, 30)).verdict == "under-powered"


def test_fewer_than_twenty_others_are_no_test() -> None:
    few = finding(scores(5.0, 30, 19))
    assert few.verdict == "under-powered" and few.value is None
    assert "site.split_fractions" in few.sentence


def test_what_is_told_without_the_release_voids_the_row() -> None:
    found = finding(scores(2.0), blind=scores(1.0, seed=1))
    assert found.verdict == "void" and found.epsilon_low is None


def test_knowing_the_site_is_no_membership() -> None:
    member = np.array([True] * 40 + [False] * 20 + [True] * 20 + [False] * 40)
    site = np.repeat([0, 1], 60)
    values = np.random.default_rng(0).normal(size=120) + 5.0 * (site == 0)
    assert judged("a: b", "loss", Scores(values, member, site), "").verdict != "found"


def test_nobodys_membership_is_claimed_as_seldom_as_the_interval_says() -> None:
    alarms, tried = false_alarms([scores(2.0), scores(0.0), scores(1.0, 30, 10)], draws=500)
    assert tried == 1000  # the third has too few others
    assert clopper_pearson(alarms, tried, 0.999)[0] <= 0.025


def test_a_blind_classifier_finds_groups_that_differ_and_only_those() -> None:
    draws = np.random.default_rng(0)
    member, site = np.arange(200) < 100, np.zeros(200, int)
    alike = draws.normal(size=(200, 12))
    assert finding(scores(1.0, 100, 100), blind_from(alike, member, site)).verdict == "found"
    shifted = alike + member[:, None]
    assert finding(scores(1.0, 100, 100), blind_from(shifted, member, site)).verdict == "void"
