import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.exchanges.exchange import AskRefused
from client.exchanges.probes import ANSWER, probe_hits, probe_sums, probed_patients
from client.training.site_state import StateFolder
from federation.exchanges.probes import (
    ANATOMY,
    FACTORS,
    HITS,
    RECOGNITION,
    SWAPPED,
    SWAPPED_PATIENTS,
    UNBOUNDED,
    ProbeAsk,
    fold_moments,
    probe_shapes,
    style_moments,
    sums_bound,
    sums_shapes,
)
from federation.plan.plan import ProbePlan, RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import CohortTooSmall, StyleMoments
from privacy.clipping import joint_norm
from tests.worlds import Hospital, coded, coded_network, unanswered_places

answer_probe = ANSWER.once
SECRET = b"1" * 32
PATIENTS = [f"p{n // 2}" for n in range(24)]
PROBES = ProbePlan(every_rounds=1, folds=3, anatomy={"age": (20.0, 90.0), "sex": (0.0, 1.0)})


@pytest.fixture
def plan(toy_plan: Any) -> RunPlan:
    plan: RunPlan = toy_plan(probes=PROBES)
    return plan


@pytest.fixture
def scans(toy_scans: Any) -> Any:
    held = toy_scans(PATIENTS, site=1)
    held.covariates = [{"age": 30.0 + int(p[1:]), "sex": "F" if int(p[1:]) % 2 else "M"} for p in PATIENTS]
    return held


def network(plan: RunPlan) -> MeDUET:
    return coded_network(plan)


def test_folds_are_even_by_patient_and_do_not_depend_on_the_order_of_scans(plan: RunPlan, scans: Any) -> None:
    probed = probed_patients(scans, plan, 0, SECRET)
    assert sorted(probed.folds.values()) == [0] * 4 + [1] * 4 + [2] * 4
    scans.train = scans.train[::-1]
    assert dict(probed_patients(scans, plan, 0, SECRET).folds) == dict(probed.folds)


def test_the_sums_are_those_of_each_folds_patients(plan: RunPlan, scans: Any, toy_bank: Any) -> None:
    student, probed = network(plan), probed_patients(scans, plan, 0, SECRET)
    sums = probe_sums(student, scans, probed, plan, toy_bank(plan), 1)
    assert {name: tuple(t.shape) for name, t in sums.items()} == sums_shapes(plan)
    with torch.no_grad():
        x = scans.values[:, 0]
        both = torch.cat([student.content_code(x), student.pooled_style(x)], 1).double()
    patients = both.reshape(12, 2, -1).mean(1)
    for fold, moments in enumerate(fold_moments(sums, FACTORS, plan)):
        mine = patients[[probed.folds[f"p{i}"] == fold for i in range(12)]]
        assert float(moments.count) == 4
        torch.testing.assert_close(moments.total, mine.sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.outer, mine.T @ mine, rtol=1e-5, atol=1e-5)
    anatomy = fold_moments(sums, ANATOMY, plan)
    ages = [2 * (10.0 + i) / 70 - 1 for i in range(12) if probed.folds[f"p{i}"] == 0]
    assert float(anatomy[0].total[-2]) == pytest.approx(sum(ages), abs=1e-5)


def test_one_patients_share_is_within_the_promise(plan: RunPlan, scans: Any, toy_bank: Any) -> None:
    student, probed = network(plan), probed_patients(scans, plan, 0, SECRET)
    sums = probe_sums(student, scans, probed, plan, toy_bank(plan), 1)
    covered = {name: tensor for name, tensor in sums.items() if name not in UNBOUNDED}
    assert 0 < joint_norm(covered) <= 12 * sums_bound(plan)
    one = replace(probed, rows=probed.rows[:2], patients=probed.patients[:2])
    scaled = network(plan)
    scaled.code_matrix *= 1e3  # codes far beyond their bound
    alone = probe_sums(scaled, scans, replace(one, folds={"p0": 0}, least=0), plan, toy_bank(plan), 1)
    assert joint_norm({n: t for n, t in alone.items() if n not in UNBOUNDED}) <= sums_bound(plan) * (1 + 1e-9)


def test_patients_are_recognised_and_swaps_described_in_every_other_style(
    plan: RunPlan, scans: Any, toy_bank: Any
) -> None:
    student, probed, bank = network(plan), probed_patients(scans, plan, 0, SECRET), toy_bank(plan)
    sums = probe_sums(student, scans, probed, plan, bank, 1)
    content, style, asked, chance = sums[RECOGNITION].tolist()
    assert (asked, chance) == (24, 2) and 0 <= style <= content <= 24
    assert content == 24  # content does not see a change of channel means and scales
    assert sums[SWAPPED_PATIENTS].tolist() == [12, 0, 12]
    moments = style_moments(sums[SWAPPED][0], sums[SWAPPED_PATIENTS][0], plan)
    assert moments.entry().mean.shape == (2,)
    without = probe_sums(student, scans, probed, plan, None, 1)
    assert not without[RECOGNITION].any() and not without[SWAPPED].any()


def test_style_sums_survive_the_vector(plan: RunPlan, scans: Any) -> None:
    from federation.exchanges.probes import style_vector
    from federation.exchanges.survey import survey_layout

    whole = StyleMoments.of(scans.values[:, 0], PATIENTS, survey_layout(plan))
    back = style_moments(style_vector(whole), whole.sums["count"][0], plan)
    torch.testing.assert_close(back.entry().to_vector(), whole.entry().to_vector())


def test_anatomy_is_told_of_patients_of_whom_all_is_known_or_of_nobody(
    plan: RunPlan, scans: Any, toy_bank: Any
) -> None:
    student, probed = network(plan), probed_patients(scans, plan, 0, SECRET)
    first = next(name for name, fold in probed.folds.items() if fold == 0)
    for row, patient in enumerate(PATIENTS):
        if patient == first:
            scans.covariates[row] = {"age": 50.0}
    sums = probe_sums(student, scans, probed, plan, None, 1)
    assert [float(f.count) for f in fold_moments(sums, ANATOMY, plan)] == [3, 4, 4]
    strict = probed_patients(scans, plan, 4, SECRET)
    assert not probe_sums(student, scans, strict, plan, None, 1)[ANATOMY].any()


def test_hits_are_counts_of_the_probe_fitted_without_the_patient(plan: RunPlan, scans: Any) -> None:
    student, probed = network(plan), probed_patients(scans, plan, 0, SECRET)
    probe = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in probe_shapes(plan).items()}
    probe["content_bias"][:, 1] = 1.0  # everybody is of site 1
    probe["style_bias"][0, 1] = 1.0  # those of fold 0 are, by style; the rest of site 0
    probe["style_bias"][1:, 0] = 1.0
    assert probe_hits(student, scans, probed, plan, probe, 1)[HITS].tolist() == [12, 4, 12]
    assert probe_hits(student, scans, probed, plan, probe, 0)[HITS].tolist() == [0, 8, 12]
    with pytest.raises(ValueError, match="other shapes"):
        probe_hits(student, scans, probed, plan, {"content_weight": torch.zeros(2)}, 1)
    probe["style_weight"][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        probe_hits(student, scans, probed, plan, probe, 1)


@pytest.fixture
def site(tmp_path: Path, scans: Any, plan: RunPlan) -> Hospital:
    site = Hospital(tmp_path / "south", scans, name="south")
    named = network(plan).state_dict()
    home = {n: named[n] for n in home_keys(network(plan), plan.style.head, plan.aggregation.method)}
    StateFolder(site.state_dir / "state", plan.sha256).enter(1, lambda: home)
    return site


def ask(plan: RunPlan, bank: StyleBank, round_number: int = 1, **probe: torch.Tensor) -> ProbeAsk:
    named = network(plan).state_dict()
    shared = {n: named[n] for n in shared_keys(network(plan), plan.style.head, plan.aggregation.method)}
    return ProbeAsk(
        plan_json=plan.to_json(),
        round=round_number,
        shared=coded(plan, shared),
        bank=bank.to_tensors(),
        probe=probe,
    )


def test_both_exchanges_pass_the_gate_and_are_in_the_books(
    site: Hospital, plan: RunPlan, toy_bank: Any
) -> None:
    first = answer_probe(site, ask(plan, toy_bank(plan)), plan)
    assert first.tensors.keys() == sums_shapes(plan).keys()
    assert first.record["not_covered"] == sorted(UNBOUNDED) and first.record["weight"] == 12
    probe = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in probe_shapes(plan).items()}
    second = answer_probe(site, ask(plan, toy_bank(plan), **probe), plan)
    assert second.tensors.keys() == {HITS}
    assert site.journal.verify() == 2 and site.ledger.verify() == 4
    assert unanswered_places(site.state_dir / "ledger.jsonl") == []


def test_a_fold_below_the_cohort_tells_nothing(site: Hospital, plan: RunPlan, toy_bank: Any) -> None:
    site.minimum_cohort = 5  # folds of four
    with pytest.raises(CohortTooSmall, match="at least 5 patients in each of 3 folds"):
        answer_probe(site, ask(plan, toy_bank(plan)), plan)
    assert site.journal.verify() == 0


def test_probes_that_the_plan_does_not_have_are_refused(site: Hospital, plan: RunPlan, toy_bank: Any) -> None:
    off = replace(plan, probes=ProbePlan())
    for refused, round_number in ((off, 1), (plan, 5), (plan, 0)):
        with pytest.raises(AskRefused) as refusal:
            answer_probe(site, ask(refused, toy_bank(plan), round_number), refused)
        assert refusal.value.kind is RefusalKind.MALFORMED
    with pytest.raises(AskRefused, match="other shapes"):
        answer_probe(site, ask(plan, toy_bank(plan), other=torch.zeros(2)), plan)
