"""Who knows all others but one: exact counts tell her always, counts in whole cohorts at the edges of one."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from audit.attacks.by_kind import ATTACKED
from audit.attacks.counts import attack_counts, attack_demographics
from audit.cohort import Cohort
from audit.evidence import Release
from federation.exchanges.demographics import counted
from federation.plan.plan import DemographicsPlan
from privacy.whole_cohorts import in_whole_cohorts
from tests.worlds import small_plan

EDGES = (20.0, 40.0, 60.0)
LEAST = 5
PLAN = small_plan(demographics=DemographicsPlan(age_edges=EDGES))


def cohort(n_in: int, n_out: int, seed: int = 0) -> Cohort:
    rng = random.Random(seed)
    known = tuple({"age": rng.uniform(0, 90), "sex": rng.choice("FM")} for _ in range(n_in + n_out))
    names = tuple(f"p{n}" for n in range(n_in + n_out))
    took_part = (True,) * n_in + (False,) * n_out
    return Cohort("north", torch.zeros(n_in + n_out, 1, 1, 1, 1), names, took_part, covariates=known)


def left(whose: Cohort, least: int) -> Release:
    """What a site that rounds to `least` tells."""
    members = [one for one, took_part in zip(whose.covariates, whose.took_part, strict=True) if took_part]
    told = {name: in_whole_cohorts(one, least) for name, one in counted(members, EDGES).items()}
    return Release("north", {"kind": "demographics", "sha256": "0" * 64}, told)


def test_exact_counts_tell_every_patient_and_whole_cohorts_those_at_an_edge() -> None:
    people = cohort(47, 30)
    exact, whole = (attack_demographics(left(people, least), people, PLAN) for least in (1, LEAST))
    assert exact is not None and whole is not None
    assert exact.verdict == "found" and exact.value == 1.0 and "(exact)" in exact.sentence
    counts = counted(people.covariates[:47], EDGES)
    edges = {name: (one % LEAST == 0) & (one > 0) for name, one in counts.items()}
    at_edge = sum(
        any(bool((edges[name] & (share > 0)).any()) for name, share in counted([one], EDGES).items())
        for one in people.covariates[:47]
    )
    assert whole.value == at_edge / 47 < 1.0


@pytest.mark.parametrize("least", [LEAST, 20])
def test_over_many_cohorts_a_patient_shows_for_one_in_as_many_sizes_as_a_cohort_has(least: int) -> None:
    told = []
    for n in range(200, 400):
        shares, member = torch.ones(n, 1, dtype=torch.float64), np.ones(n, dtype=bool)
        whole = in_whole_cohorts(shares.sum(0), least)
        told.append(attack_counts("north: counts", shares, member, whole, least).value)
    assert np.mean(np.array(told, dtype=float)) == 1 / least


def test_a_larger_cohort_of_the_sites_own_is_found_out_and_other_counts_are_not_claimed() -> None:
    people = cohort(47, 30)
    own = attack_demographics(left(people, 7), people, PLAN)
    assert own is not None and "whole cohorts of 7" in own.sentence
    without = replace(people, took_part=(*people.took_part[:40], *(False,) * 37))
    assert (other := attack_demographics(left(people, LEAST), without, PLAN)) is not None
    assert other.verdict == "under-powered"


def test_demographics_has_an_attack_and_none_without_ages_and_sexes() -> None:
    people = cohort(47, 30)
    assert "demographics" in ATTACKED
    assert attack_demographics(left(people, LEAST), replace(people, covariates=()), PLAN) is None
