"""Pooled counts: intervals hold over all that rounding hides; exact counts show one patient more."""

import numpy as np
import pytest
import torch

from audit.attacks.by_kind import ATTACKED
from audit.attacks.claims import attack_claims, claims_of, pooled_claims
from audit.cohort import Cohort
from audit.evidence import Release
from federation.exchanges.audit_counts import TRIED, PooledCounts, Told
from federation.plan.plan import AuditCountsPlan
from meduet_models.meduet import MeDUET
from privacy.whole_cohorts import in_whole_cohorts
from server.exchanges.audit_counts import pooled
from tests.worlds import GRID, small_network, small_plan

CELL = 20
PLAN = small_plan(network=small_network(code_size=24), audit_counts=AuditCountsPlan(false_alarms=0.5))
NETWORK = MeDUET(PLAN.network, len(PLAN.sites), seed=PLAN.seed).eval()


def cohort(n_in: int = 90, n_out: int = 150) -> Cohort:
    n = n_in + n_out
    latents = torch.randn(n, 2, *GRID, generator=torch.Generator().manual_seed(0))
    took_part = (True,) * n_in + (False,) * n_out
    return Cohort("north", latents, tuple(f"p{one}" for one in range(n)), took_part)


def left(people: Cohort, cell: int) -> Release:
    claims = claims_of(people, PLAN, NETWORK)
    assert claims is not None
    told = {attack: in_whole_cohorts(claims[attack].sum(0), cell) for attack in TRIED}
    return Release("north", {"kind": "audit_counts", "sha256": "0" * 64}, told)


def sides(counts: torch.Tensor, sites: int) -> PooledCounts:
    tp, fn, fp, tn = (int(one) for one in counts)
    members, others = Told(claimed=tp, missed=fn, sites=sites), Told(claimed=fp, missed=tn, sites=sites)
    return PooledCounts(members=members, others=others)


CHANCE = sides(torch.tensor([500, 500, 500, 500]), 5)


def test_who_knows_all_scores_but_hers_sees_every_patient_in_exact_counts_and_few_in_whole_cells() -> None:
    assert "audit_counts" in ATTACKED
    people = cohort()
    exact, whole = (attack_claims(left(people, cell), people, PLAN, NETWORK) for cell in (1, CELL))
    assert exact is not None and whole is not None
    assert exact.value == 1.0 and exact.verdict == "found"
    claims = claims_of(people, PLAN, NETWORK)
    assert claims is not None
    cells = torch.cat([claims[attack] for attack in TRIED], 1)
    at_edge = cells.sum(0) % CELL == 0
    assert whole.value is not None and exact.n_in == whole.n_in
    assert whole.value == float((cells * at_edge).any(1).sum()) / whole.n_in < 1.0


def test_without_others_to_fix_a_threshold_there_is_nothing_to_attack() -> None:
    assert attack_claims(left(cohort(), CELL), cohort(90, 20), PLAN, NETWORK) is None


@pytest.mark.parametrize("true, false", [(0.5, 0.5), (0.9, 0.5), (0.97, 0.02)])
def test_intervals_of_pooled_rates_hold_the_truth_whatever_the_rounding_hides(
    true: float, false: float
) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        tp, fp = rng.binomial(150, true, 5), rng.binomial(120, false, 5)
        each = [torch.tensor([a, 150.0 - a, b, 120.0 - b]) for a, b in zip(tp, fp, strict=True)]
        told = pooled([in_whole_cohorts(one, CELL) for one in each])
        found = pooled_claims("model", "loss", told, told, CELL)
        assert found.pooled is not None
        members, others = found.pooled.members, found.pooled.others
        held += members.low <= true <= members.high and others.low <= false <= others.high
    assert held >= 0.95 * 300


def test_a_leak_is_found_chance_is_not_and_few_are_under_powered() -> None:
    def verdict(counts: list[float], sites: int) -> str:
        return pooled_claims("model", "loss", sides(torch.tensor(counts), sites), CHANCE, CELL).verdict

    assert verdict([1400, 600, 1000, 1000], 5) == "found"
    assert verdict([500, 500, 500, 500], 5) == "not found"
    assert verdict([20, 20, 20, 20], 2) == "under-powered"
    assert verdict([0, 0, 0, 0], 0) == "under-powered"


def test_an_attack_that_misses_nobody_is_found_though_what_it_missed_is_told_as_none() -> None:
    told = pooled([torch.tensor([200.0, 0, 0, 200])] * 3)
    found = pooled_claims("model", "loss", told, CHANCE, CELL)
    assert found.verdict == "found" and found.value == 1.0 and found.low is not None and found.low > 0.85


def test_patients_who_differ_without_any_release_void_the_row_at_the_centre() -> None:
    leak, shift = (
        sides(torch.tensor(counts), 5) for counts in ([1400, 600, 1000, 1000], [1700, 300, 400, 1600])
    )
    found, void = (pooled_claims("model", "loss", leak, blind, CELL) for blind in (CHANCE, shift))
    assert (found.verdict, void.verdict) == ("found", "void")
    assert void.baseline is not None and void.baseline > 0.8 and "Void: " in void.sentence
    silent = pooled_claims("model", "loss", leak, sides(torch.zeros(4), 0), CELL)
    assert silent.verdict == "found" and silent.baseline is None and "no site told of one" in silent.sentence


def test_a_shift_between_scanners_shows_in_the_counts_of_the_classifier_that_sees_no_release() -> None:
    people = cohort()
    moved = people.latents + torch.tensor(people.took_part).float()[:, None, None, None, None]
    shifted = Cohort("north", moved, people.patients, people.took_part)
    for one, least, most in ((people, 0.3, 0.7), (shifted, 0.95, 1.0)):
        claims = claims_of(one, PLAN, NETWORK)
        assert claims is not None
        claimed, missed = claims["blind"].sum(0)[:2]
        assert least <= float(claimed / (claimed + missed)) <= most
