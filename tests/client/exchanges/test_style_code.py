"""The style code on its whole way out: what one patient moves, what an attacker reads, what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.exchanges import erasure, pretraining, style_code, survey
from client.exchanges.exchange import AskRefused
from client.exchanges.style_code import patient_styles
from federation.exchanges.erasure import ErasureAsk
from federation.exchanges.pretraining import TrainAsk
from federation.exchanges.style_code import CODE, StyleCodeAsk, code_promise
from federation.exchanges.style_code import style_code as axes_of
from federation.exchanges.survey import SurveyAsk
from federation.plan.plan import RunPlan
from privacy.ledger import LedgerRefusal
from privacy.style_code import SHARE_BOUND
from tests.worlds import Hospital, ViewedScans, protected_plan, public_latents

PUBLIC = public_latents()


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return protected_plan(PUBLIC, toy_plan)


def question(plan: RunPlan, public: Tensor = PUBLIC) -> StyleCodeAsk:
    return StyleCodeAsk(plan_json=plan.to_json(), public={"latents": public})


def hospital(folder: Path, patients: list[str], seed: int = 0, ceiling: float | None = 3.0) -> Hospital:
    return Hospital(folder, ViewedScans.of(patients, seed=seed), epsilon_ceiling=ceiling)


def test_one_sum_with_the_promised_noise_leaves_and_the_ledger_says_what_it_costs(
    plan: RunPlan, tmp_path: Path
) -> None:
    site = hospital(tmp_path, [f"p{n // 2}" for n in range(40)])  # two scans each
    released = style_code.ANSWER.once(site, question(plan), plan)
    assert dict(released.counts) == {} and dict(released.metrics) == {}
    exact = axes_of(plan, PUBLIC).total(list(patient_styles(site.held, plan)))
    noise = (released.tensors[CODE].double() - exact) / code_promise(plan).deviation
    assert 0.0 < float(noise.abs().max()) < 6.0
    assert 2.9 < site.ledger.spent().total.upper <= 3.0
    assert torch.equal(
        style_code.ANSWER.once(site, question(plan), plan).tensors[CODE], released.tensors[CODE]
    )
    assert site.ledger.spent().num_noised == 1 and site.journal.verify() == 2


def test_a_site_with_few_patients_or_none_answers_in_the_same_form(plan: RunPlan, tmp_path: Path) -> None:
    for number in (0, 1, 2):
        site = hospital(tmp_path / str(number), [f"p{n}" for n in range(number)])
        assert style_code.ANSWER.once(site, question(plan), plan).tensors[CODE].shape == (5,)


@pytest.mark.parametrize("ceiling", [2.9, 0.0])
def test_a_site_with_a_lower_ceiling_refuses_before_a_scan_is_read(
    plan: RunPlan, tmp_path: Path, ceiling: float
) -> None:
    site = hospital(tmp_path, ["p0", "p1"], ceiling=ceiling)
    with pytest.raises(LedgerRefusal, match="Nothing was read"):
        style_code.ANSWER.once(site, question(plan), plan)
    assert site.held.asked == [] and site.ledger.verify() == 0


def test_other_public_scans_than_the_plans_are_refused(plan: RunPlan, tmp_path: Path) -> None:
    site = hospital(tmp_path, ["p0", "p1"])
    for public in (PUBLIC + 1e-3, PUBLIC[:40], PUBLIC[:, :1]):
        with pytest.raises(AskRefused, match="public scans"):
            style_code.ANSWER.once(site, question(plan, public), plan)
    assert site.journal.verify() == site.ledger.verify() == 0  # nor does a wrong question cost anything


def test_under_privacy_a_site_has_no_other_question(plan: RunPlan, tmp_path: Path) -> None:
    site = hospital(tmp_path, [f"p{n}" for n in range(8)], ceiling=None)
    text = plan.to_json()
    with pytest.raises(AskRefused, match="survey: no round"):
        survey.ANSWER.once(site, SurveyAsk(plan_json=text), plan)
    with pytest.raises(AskRefused, match="round: no round"):
        ask = TrainAsk(plan_json=text, round=1, shared={}, bank={}, home={})
        pretraining.ANSWER.once(site, ask, plan)
    with pytest.raises(AskRefused, match="erasure: no round"):
        erasure.ANSWER.once(site, ErasureAsk(plan_json=text, shared={}), plan)
    assert site.held.asked == []


# Sensitivity, from scans: a patient has several, of any values.


def scans_of(rng: np.random.Generator, number: int) -> Tensor:
    scans = torch.from_numpy(rng.standard_normal((number, 2, 4, 6, 4))).float()
    match rng.integers(7):
        case 0:
            return scans * float(10.0 ** rng.uniform(-8, 30))
        case 1:
            return scans + float(rng.uniform(-1e6, 1e6))
        case 2:
            return torch.zeros_like(scans)
        case 3:
            scans[0, 0, 0, 0, 0] = float(rng.choice([math.nan, math.inf, 3e38]))
            return scans
        case _:
            return scans


@pytest.mark.parametrize("cases", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_patient_with_all_her_scans_never_moves_the_code_by_more_than_the_bound(
    plan: RunPlan, cases: int
) -> None:
    rng, axes, worst = np.random.default_rng(0), axes_of(plan, PUBLIC), 0.0

    def total(cohort: list[Tensor]) -> Tensor:
        names = [f"p{n}" for n, scans in enumerate(cohort) for _ in scans]
        held = ViewedScans.of(names)
        held.values = torch.cat([*cohort, torch.zeros(0, 2, 4, 6, 4)])[:, None]
        return axes.total(list(patient_styles(held, plan)))

    for _ in range(cases):
        cohort = [scans_of(rng, int(rng.integers(1, 4))) for _ in range(int(rng.integers(0, 3)))]
        other, allowed = list(cohort), SHARE_BOUND
        if cohort and rng.integers(2):
            other[0], allowed = scans_of(rng, int(rng.integers(1, 4))), 2 * SHARE_BOUND
        else:
            other.append(scans_of(rng, int(rng.integers(1, 4))))
        worst = max(worst, float((total(other) - total(cohort)).norm()) / allowed)
    assert 0.99 < worst <= 1 + 1e-9


def test_weighing_a_patient_by_her_scans_is_what_the_bound_would_not_hold(plan: RunPlan) -> None:
    """Shares of scans, and not of patients: one who was scanned five times moves the sum five times."""
    axes = axes_of(plan, PUBLIC)
    held = ViewedScans.of([f"p{n}" for n in range(5)])  # the same scans, were they five patients'
    apart = axes.total(list(patient_styles(held, plan)))
    held.patients = ["p0"] * 5
    together = axes.total(list(patient_styles(held, plan)))
    assert float(apart.norm()) > 2 * SHARE_BOUND and float(together.norm()) <= SHARE_BOUND


# Tracing: who holds a scan, and what is usual, asks whether it is behind the code (privacy.md, 3.1).


def traced(plan: RunPlan, noise: float, cohorts: int = 150, patients: int = 16) -> float:
    """Area under the curve of the best linear attacker, over cohorts of the same population."""
    axes, rng = axes_of(plan, PUBLIC), np.random.default_rng(1)
    everybody = ViewedScans.of([f"p{n}" for n in range(220)], seed=4)
    shares = torch.stack([axes.share(u) for u in patient_styles(everybody, plan)])
    usual = shares.mean(0)
    spread = torch.linalg.pinv(torch.cov(shares[:, :-1].T))  # what is usual is known exactly
    inside, outside = [], []
    for _ in range(cohorts):
        order = rng.permutation(len(shares))
        members, strangers = order[:patients], order[patients : 2 * patients]
        told = shares[members].sum(0) + noise * torch.from_numpy(rng.standard_normal(shares.shape[1]))
        lean = (told - patients * usual)[:-1] @ spread
        inside.append((shares[members] - usual)[:, :-1] @ lean)
        outside.append((shares[strangers] - usual)[:, :-1] @ lean)
    pairs = [float((a[:, None] > b[None]).double().mean()) for a, b in zip(inside, outside, strict=True)]
    return sum(pairs) / len(pairs)


def test_members_are_traced_in_a_code_without_noise_and_not_beyond_the_bound_with_it(
    toy_plan: Callable[..., RunPlan],
) -> None:
    plan = protected_plan(PUBLIC, toy_plan, style_dimensions=16, epsilon=1.0)
    multiplier = code_promise(plan).mechanism
    assert multiplier is not None
    most = 0.5 * math.erfc(-1 / (2 * multiplier.noise_multiplier))  # Phi(1 / (sigma sqrt 2)), any attacker
    assert traced(plan, noise=0.0) > 0.75
    assert traced(plan, noise=code_promise(plan).deviation) < most + 0.02 < 0.6


def test_two_codes_around_a_newcomer_do_not_give_her_style_and_the_second_meets_the_ceiling(
    plan: RunPlan, toy_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    patients = [f"p{n}" for n in range(12)]
    site = hospital(tmp_path, patients, ceiling=None)  # a site without a ceiling: what the noise itself hides
    first = style_code.ANSWER.once(site, question(plan), plan).tensors[CODE].double()
    values = site.held.values
    site.held = ViewedScans.of([*patients, "new"])
    site.held.values[:12] = values
    other = protected_plan(PUBLIC, lambda **parts: toy_plan(**parts, name="again"))
    second = style_code.ANSWER.once(site, question(other), other).tensors[CODE].double()
    axes = axes_of(plan, PUBLIC)
    hers = axes.share(list(patient_styles(site.held, plan))[-1])
    assert float((second - first - hers).norm()) > 1.0 > 0.9 * float(hers.norm())
    strict: Any = hospital(tmp_path / "strict", patients)
    style_code.ANSWER.once(strict, question(plan), plan)
    with pytest.raises(LedgerRefusal, match="that makes"):
        style_code.ANSWER.once(strict, question(other), other)
