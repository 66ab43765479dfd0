"""The audit of latents that left with noise: raw ones under the name of samples are found, moments traced."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audit.attacks.by_kind import audit
from audit.attacks.noised import attack_moments, attack_samples, moments_shares
from audit.cohort import Cohort
from audit.effort import QUICK
from audit.evidence import Evidence, Release, SiteBooks
from audit.findings import worst
from client.audit import question_of
from client.exchanges import latent_moments, synthetic_latents
from client.exchanges.latent_moments import question_path
from federation.exchanges.latent_moments import MOMENTS, MomentsAsk, moments_promise
from federation.plan.plan import RunPlan
from tests.client.exchanges.test_synthetic_latents import question as asked_for_samples
from tests.rounds.noised import PUBLIC, bank_of_styles, the_plan
from tests.worlds import Hospital, ViewedScans

INSIDE, OUTSIDE = 40, 40


def scans() -> ViewedScans:
    held = ViewedScans.of([f"p{n}" for n in range(INSIDE + OUTSIDE)], seed=3)
    held.train = list(range(INSIDE))
    return held


def cohort(held: ViewedScans) -> Cohort:
    took_part = tuple(row < INSIDE for row in range(INSIDE + OUTSIDE))
    return Cohort("oslo", held.values[:, 0], tuple(held.patients), took_part)


def released(kind: str, tensors: dict[str, Tensor]) -> Release:
    return Release("oslo", {"kind": kind, "sha256": "1" * 64}, tensors)


@pytest.mark.parametrize("rounding", [0.0, 2.0**-9])
def test_raw_latents_under_the_name_of_samples_are_found(rounding: float) -> None:
    held = scans()
    raw = held.values[:30, 0] * (1 + rounding)
    finding = attack_samples(released("synthetic_latents", {"latents": raw}), cohort(held))
    assert finding.verdict == "found" and "30 of them ARE scans of its patients" in finding.sentence
    one = torch.cat([torch.randn(29, 2, 4, 6, 4, generator=torch.Generator().manual_seed(9)), raw[:1]])
    finding = attack_samples(released("synthetic_latents", {"latents": one}), cohort(held))
    assert finding.verdict == "found" and "1 of them ARE" in finding.sentence


def test_samples_of_nobody_are_not_accused_and_few_others_are_too_few() -> None:
    held = scans()
    nobody = torch.randn(30, 2, 4, 6, 4, generator=torch.Generator().manual_seed(9))
    release = released("synthetic_latents", {"latents": nobody})
    assert attack_samples(release, cohort(held)).verdict == "not found"
    alone = dataclasses.replace(cohort(held), took_part=(True,) * (INSIDE + OUTSIDE))
    assert attack_samples(release, alone).verdict == "under-powered"


def test_members_are_traced_in_moments_without_noise_and_not_beyond_the_bound_with_it() -> None:
    plan, held = the_plan("aggregate"), scans()
    aggregate = dataclasses.replace(plan.diffusion.aggregate, dimensions=60)  # type: ignore[union-attr]
    plan = the_plan("aggregate", aggregate=aggregate)
    question = {"latents": PUBLIC, **bank_of_styles(plan).to_tensors()}
    total = moments_shares(cohort(held), plan, question)[:INSIDE].sum(0)

    def area(told: Tensor) -> float:
        release = released("latent_moments", {MOMENTS: told})
        finding = attack_moments(release, cohort(held), plan, question, [])
        assert finding.value is not None and (finding.verdict == "found" or told is not total)
        return finding.value

    assert area(total) > 0.75
    deviation, areas = moments_promise(plan).deviation, []
    for seed in range(4):
        draws = torch.Generator().manual_seed(seed)
        noise = torch.randn(total.shape, generator=draws, dtype=torch.float64)
        areas.append(area(total + deviation * noise))
    assert sum(areas) / 4 < 0.6


@pytest.mark.parametrize("policy", ["synthetic", "aggregate"])
def test_what_a_site_released_is_audited_from_its_own_books(tmp_path: Path, policy: str) -> None:
    plan, held = the_plan(policy), scans()
    site = Hospital(tmp_path, held, "oslo", epsilon_ceiling=8.0)
    answer: Any
    if policy == "synthetic":
        answer = synthetic_latents.ANSWER.once(site, asked_for_samples(plan), plan)
    else:
        bank = bank_of_styles(plan).to_tensors()
        ask = MomentsAsk(plan_json=plan.to_json(), round=2, public={"latents": PUBLIC}, bank=bank)
        answer = latent_moments.ANSWER.once(site, ask, plan)
    release = Release("oslo", dict(answer.record), dict(answer.tensors))
    audited = audit(evidence(plan, site, cohort(held), release), QUICK, lambda text: None)
    (row,) = [one for one in audited.artefacts if one.name == f"oslo: {release.kind}"]
    assert worst(list(row.findings)) != "not audited" and 0 < row.epsilon < 8.0
    assert row.findings[0].attack == {"synthetic": "copies", "aggregate": "tracing"}[policy]
    if policy == "aggregate":
        question_path(tmp_path, plan.sha256).unlink()
        audited = audit(evidence(plan, site, cohort(held), release), QUICK, lambda text: None)
        (row,) = [one for one in audited.artefacts if one.name == f"oslo: {release.kind}"]
        assert "came with the question are not kept any more" in row.findings[0].sentence


def evidence(plan: RunPlan, site: Hospital, own: Cohort, release: Release) -> Evidence:
    return Evidence(
        name="toy",
        plan=plan,
        books={"oslo": SiteBooks(site.state_dir / "journal.jsonl", site.state_dir / "ledger.jsonl")},
        releases=[release],
        cohorts={"oslo": own},
        hashes={},
        question_of=lambda one: question_of(site.state_dir, one),
    )
