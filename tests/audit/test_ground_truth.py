"""What must be found in what left without protection, and what must not be claimed: the exact rows.

Rows are those of the issue: candidates' scans are held from elsewhere, releases are real answers of a site.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.attacks import algebra
from audit.attacks.by_kind import audit
from audit.attacks.sums import attack_hits, probe_products
from audit.codes import codes_of
from audit.effort import QUICK
from audit.findings import Finding
from audit.statistics.intervals import area
from client.consent.exact_sums import TooFewForSums
from tests.audit.released import Answered, gaussian, toy_plan


def found(answered: Answered, attack: str) -> Finding:
    audited = audit(answered.evidence(), QUICK, lambda text: None)
    (one,) = [finding for finding in audited.findings if finding.attack == attack]
    return one


# Rows 1 to 3: sums of products


def test_sums_of_products_over_few_name_each_member_and_nobody_else(tmp_path: Path) -> None:
    finding = found(Answered(tmp_path, 30, 30, toy_plan()).ask("probe"), "span")
    assert (finding.verdict, finding.value, finding.baseline) == ("found", 1.0, 0.0)
    assert finding.low is not None and finding.low > 0.85
    assert "identify each of its 30 patients to whoever holds her scan" in finding.sentence


def test_the_residual_outside_the_span_tells_members_by_nine_orders() -> None:
    x = gaussian(60, 96, seed=0)
    products = x[:29].T @ x[:29]
    outside = algebra.outside_span(x, products)
    assert float(outside[:29].max()) < 1e-11 and float(outside[29:].min()) > 1e-3
    assert algebra.rank(products) == 29


def test_where_fewer_were_summed_than_numbers_leverage_ranks_the_wrong_way_and_is_not_claimed(
    tmp_path: Path,
) -> None:
    x = gaussian(60, 96, seed=0)
    scores = -algebra.reach(x, x[:29].T @ x[:29]).numpy()
    assert area(scores[:29], scores[29:]) < 0.2
    audited = audit(Answered(tmp_path, 18, 30, toy_plan()).ask("probe").evidence(), QUICK, lambda text: None)
    assert "leverage" not in {finding.attack for finding in audited.findings}


def test_pooled_over_sites_leverage_still_tells_126_patients_of_width_96() -> None:
    x = gaussian(252, 96, seed=1)
    scores = -algebra.reach(x, x[:126].T @ x[:126]).numpy()
    assert area(scores[:126], scores[126:]) > 0.999


def test_leverage_fades_with_thirty_patients_for_each_number() -> None:
    areas = []
    for n in (40, 125, 250, algebra.smallest_cohort(24)):
        x = gaussian(2 * n, 24, seed=n)
        scores = -algebra.reach(x, x[:n].T @ x[:n]).numpy()
        areas.append(area(scores[:n], scores[n:]))
    assert areas == sorted(areas, reverse=True) and areas[0] > 0.9 and areas[-1] < 0.6


def test_what_was_measured_of_each_patient_follows_from_the_probe_sums(tmp_path: Path) -> None:
    finding = found(Answered(tmp_path, 30, 30, toy_plan()).ask("probe"), "measured")
    assert (finding.verdict, finding.value) == ("found", 1.0)


def test_a_coin_for_each_patient_is_recovered_by_least_squares() -> None:
    x, coins = gaussian(25, 96, seed=2), torch.arange(25) % 2
    solved = algebra.solved(x, x.T @ coins.double()[:, None])
    assert solved is not None and torch.equal(solved[:, 0].round().long(), coins)
    assert algebra.solved(gaussian(100, 96, seed=3), torch.zeros(96, 1, dtype=torch.float64)) is None


# Row 4: one crafted question


def test_one_crafted_question_tells_whether_one_candidate_is_a_patient(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 30, 30, toy_plan()).ask("probe")
    evidence = answered.evidence()
    network = evidence.network_of(answered.releases[0])
    assert network is not None
    codes = codes_of(network, answered.cohort)
    (one, _) = probe_products(answered.releases[0], answered.cohort, answered.plan, codes)
    finding = attack_hits(answered.releases[0], one)
    assert finding.value is not None and finding.value > 0.9 and finding.baseline == 0.0


# Rows 5 and 6: sums of vectors


@pytest.mark.parametrize(("patients", "least", "most"), [(16, 0.9, 1.0), (40, 0.8, 0.97), (640, 0.5, 0.66)])
def test_the_mean_of_few_is_traced_by_whoever_knows_what_is_usual(
    patients: int, least: float, most: float
) -> None:
    x, others = gaussian(patients, 108, seed=4), gaussian(1200, 108, seed=5)
    mean, reference, rest = x.mean(0), others[:1000], others[1000:]
    inside = algebra.leaning(x, mean, reference).numpy()
    value = area(inside, algebra.leaning(rest, mean, reference).numpy())
    assert least < value < most
    assert abs(value - algebra.tracing_area(float(patients), 108)) < 0.08


def test_spread_of_the_numbers_hides_nobody_from_an_attacker_who_whitens() -> None:
    scale = torch.logspace(0, -4, 108, dtype=torch.float64)
    x, others = gaussian(16, 108, seed=4) * scale, gaussian(1200, 108, seed=5) * scale
    mean, reference, rest = x.mean(0), others[:1000], others[1000:]
    whitened = area(
        algebra.leaning(x, mean, reference).numpy(), algebra.leaning(rest, mean, reference).numpy()
    )
    plain = area((x @ mean).numpy(), (rest @ mean).numpy())
    assert plain < 0.85 < 0.93 < whitened


@pytest.mark.parametrize("kind", ["survey", "erasure"])
def test_a_pool_that_holds_all_members_is_solved_exactly(tmp_path: Path, kind: str) -> None:
    finding = found(Answered(tmp_path, 12, 12, toy_plan(24)).ask(kind), "pool")
    assert (finding.verdict, finding.value) == ("found", 1.0)


def test_a_pool_without_one_member_is_not_claimed_to_be_solved() -> None:
    x = gaussian(40, 108, seed=6)
    assert algebra.weights_in(x, x[:20].sum(0))[1]
    assert not algebra.weights_in(x[1:], x[:20].sum(0))[1]
    assert not algebra.weights_in(gaussian(300, 108, seed=7), x[:20].sum(0))[1]


# Row 7: two sums, one patient apart


def test_two_surveys_one_patient_apart_are_her_statistics(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 12, 8, toy_plan()).ask("survey")
    answered.scans.train.append(12)
    answered.plan = replace(answered.plan, name="next year")
    finding = found(answered.ask("survey"), "difference")
    assert (finding.verdict, finding.value) == ("found", 1.0)
    answered.scans.train += [13, 14]
    answered.plan = replace(answered.plan, name="the year after")
    answered.releases = [answered.releases[0]]
    audited = audit(answered.ask("survey").evidence(), QUICK, lambda text: None)
    assert "difference" not in {f.attack for f in audited.findings}


# Where the product refuses, nothing is there to be found


def test_where_sums_over_few_are_refused_nothing_of_them_is_claimed(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 18, 30, toy_plan(24), exact_sums=False).ask("survey")
    for kind in ("probe", "erasure"):
        with pytest.raises(TooFewForSums):
            answered.ask(kind)
    audited = audit(answered.evidence(), QUICK, lambda text: None)
    claimed = {f.attack for f in audited.findings if f.verdict == "found"}
    assert not claimed & {"span", "leverage", "measured", "hits"}
    assert {a.name for a in audited.artefacts} == {"north: books", "north: survey"}


def test_members_from_another_scanner_void_the_row(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 40, 40, toy_plan(24))
    answered.scans.values[:40] = answered.scans.values[:40] * 1.5 + 0.7
    finding = found(answered.ask("survey"), "tracing")
    assert finding.verdict == "void" and finding.baseline is not None and finding.baseline > 0.9
    assert finding.epsilon_low is None


def test_of_a_sum_with_noise_no_exact_claim_is_made(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 30, 30, toy_plan()).ask("probe", "survey")
    noise = torch.Generator().manual_seed(0)
    for release in answered.releases:
        assert release.tensors is not None
        for tensor in release.tensors.values():
            tensor += float(tensor.abs().mean()) * torch.randn(tensor.shape, generator=noise)
    audited = audit(answered.evidence(), QUICK, lambda text: None)
    exact = [f for f in audited.findings if f.attack in ("span", "measured", "pool")]
    assert exact and all(f.verdict != "found" for f in exact)


def test_the_area_of_tracing_is_that_of_the_signal() -> None:
    assert np.isclose(algebra.tracing_area(16.0, 16), 0.7602, atol=1e-3)
