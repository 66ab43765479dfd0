"""Moments on their whole way out: what one patient moves, what an attacker reads, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.exchanges import latent_moments, latents, style_code
from client.exchanges.exchange import AskRefused
from client.exchanges.latent_moments import patient_latents
from federation.exchanges.latent_moments import (
    MOMENTS,
    MomentsAsk,
    aggregate_of,
    moments_promise,
    public_moments,
)
from federation.exchanges.latents import LatentsAsk
from federation.exchanges.style_code import StyleCodeAsk
from federation.plan.plan import RunPlan
from meduet_models.style.bank import StyleBank
from meduet_models.style.common_style import CommonStyle
from meduet_models.weights import load_weights
from privacy.latent_moments import SHARE_BOUND
from privacy.ledger import AnsweredBefore, LedgerRefusal
from server.exchanges.latent_moments import DrawnLatents
from strategies.aggregation import ReplyRefused
from tests.rounds.noised import PUBLIC, bank_of_styles, the_plan
from tests.worlds import Hospital, ViewedScans


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return the_plan("aggregate")


def question(plan: RunPlan, public: Tensor = PUBLIC, shift: float = 0.0) -> MomentsAsk:
    bank = bank_of_styles(plan, shift).to_tensors()
    return MomentsAsk(plan_json=plan.to_json(), round=2, public={"latents": public}, bank=bank)


def hospital(folder: Path, patients: list[str], ceiling: float | None = 8.0, seed: int = 0) -> Hospital:
    return Hospital(folder, ViewedScans.of(patients, seed=seed), "oslo", epsilon_ceiling=ceiling)


def total(plan: RunPlan, held: ViewedScans) -> Tensor:
    common = CommonStyle.of(bank_of_styles(plan))
    return public_moments(plan, common, PUBLIC).total(list(patient_latents(held, common, "oslo")))


@pytest.mark.parametrize("number", [0, 1, 40])
def test_one_sum_with_the_promised_noise_leaves_in_one_form_and_once(
    plan: RunPlan, tmp_path: Path, number: int
) -> None:
    site = hospital(tmp_path, [f"p{n // 2}" for n in range(number)])  # two scans each
    released = latent_moments.ANSWER.once(site, question(plan), plan)
    assert dict(released.counts) == {} == dict(released.metrics) and set(released.tensors) == {MOMENTS}
    noise = (released.tensors[MOMENTS].double() - total(plan, site.held)) / moments_promise(plan).deviation
    assert 0.0 < float(noise.abs().max()) < 6.0
    again = latent_moments.ANSWER.once(site, question(plan), plan)
    assert torch.equal(again.tensors[MOMENTS], released.tensors[MOMENTS])
    assert site.ledger.spent().num_noised == 1
    assert set(load_weights(latent_moments.question_path(tmp_path, plan.sha256))[0]) > {"latents", "mean"}
    with pytest.raises(AnsweredBefore, match="Nothing was read"):
        latent_moments.ANSWER.once(site, question(plan, shift=0.1), plan)


@pytest.mark.parametrize("spoiled", ["as she is", "huge", "nan", "zero"])
def test_one_patient_with_all_her_scans_moves_the_sum_by_the_bound_at_most(
    plan: RunPlan, spoiled: str
) -> None:
    names = [f"p{n // 3}" for n in range(12)]
    held, others = ViewedScans.of(names), ViewedScans.of(names)
    others.train = others.train[:9]
    held.values[9:] *= {"as she is": 1.0, "huge": 1e20, "nan": math.nan, "zero": 0.0}[spoiled]
    moved = float((total(plan, held) - total(plan, others)).norm())
    assert moved <= SHARE_BOUND * (1 + 1e-9) and (moved == 0) == (spoiled == "nan")


def test_a_share_for_each_scan_is_what_the_bound_would_not_hold(plan: RunPlan) -> None:
    """A wrong wiring: scans take the place of patients."""
    held, others = ViewedScans.of([f"p{n}" for n in range(12)]), ViewedScans.of([f"p{n}" for n in range(12)])
    others.train = others.train[:9]  # her three scans, were they three patients'
    assert float((total(plan, held) - total(plan, others)).norm()) > SHARE_BOUND


def traced(plan: RunPlan, noise: float, trials: int = 400) -> float:
    """AUC of telling a member, by whoever knows everybody else and her."""
    common = CommonStyle.of(bank_of_styles(plan))
    axes = public_moments(plan, common, PUBLIC)
    shares = torch.stack([axes.share(x) for x in patient_latents(
        ViewedScans.of([f"p{n}" for n in range(24)]), common, "oslo")])  # fmt: skip
    draws, sums, hers = torch.Generator().manual_seed(0), shares[1:].sum(0), shares[0]
    noises = noise * torch.randn(2, trials, len(hers), generator=draws, dtype=torch.float64)
    without, within = (sums + noises[0]) @ hers, (sums + hers + noises[1]) @ hers
    pairs = within[:, None] - without
    return float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)


def test_a_member_is_traced_in_moments_without_noise_and_not_beyond_the_bound_with_it(plan: RunPlan) -> None:
    promise = moments_promise(plan)
    most = 0.5 * math.erfc(-1 / (2 * promise.deviation / promise.bound))  # any attacker
    assert traced(plan, 0.0) == 1.0
    assert traced(plan, promise.deviation) < most + 4.9 * 0.0205 < 1.0  # a false alarm in a million


def test_a_ceiling_that_both_releases_pass_refuses_the_second_before_a_scan_is_read(
    plan: RunPlan, tmp_path: Path
) -> None:
    site = hospital(tmp_path, ["p0", "p1"], ceiling=7.0)
    ask = StyleCodeAsk(plan_json=plan.to_json(), public={"latents": PUBLIC})
    style_code.ANSWER.once(site, ask, plan)
    site.held.asked.clear()
    with pytest.raises(LedgerRefusal, match=r"'latent_moments'.*ceiling is 7"):
        latent_moments.ANSWER.once(site, question(plan), plan)
    assert site.held.asked == []


def test_other_public_scans_a_bank_without_the_site_and_raw_latents_are_refused(
    plan: RunPlan, tmp_path: Path
) -> None:
    site = hospital(tmp_path, ["p0", "p1"])
    with pytest.raises(AskRefused, match="public scans"):
        latent_moments.ANSWER.once(site, question(plan, PUBLIC + 1e-3), plan)
    assert site.ledger.verify() == 0
    bank = bank_of_styles(plan)
    bank.count[0] = 0
    ask = MomentsAsk(plan_json=plan.to_json(), round=2, public={"latents": PUBLIC}, bank=bank.to_tensors())
    with pytest.raises(AskRefused, match="protected style of this site"):
        latent_moments.ANSWER.once(site, ask, plan)
    raw = LatentsAsk(plan_json=plan.to_json(), round=2, first=0, count=1)
    with pytest.raises(AskRefused, match=r"latents: no round|sites release latents"):
        latents.ANSWER.once(site, raw, plan)
    assert site.held.asked == []


def test_draws_follow_the_moments_and_moments_of_nobody_are_put_aside(plan: RunPlan) -> None:
    bank = bank_of_styles(plan)
    drawn, axes = DrawnLatents(plan, PUBLIC, bank), public_moments(plan, CommonStyle.of(bank), PUBLIC)
    coded = [axes.centre + (0.5 * axes.back[:, 0]) * (1 + 0.01 * n) for n in range(50)]
    reply = latent_moments.MomentsReply(
        plan_sha256=plan.sha256,
        site="oslo",
        moments={MOMENTS: axes.total(coded * 400)},
    )
    drawn.check(reply)
    told = drawn.of_site(reply)
    assert torch.equal(told.examples.latents, drawn.of_site(reply).examples.latents)
    assert len(told.items) == aggregate_of(plan).samples and told.examples.spacing.isnan().all()
    back = CommonStyle.of(bank).into(told.examples.latents, "oslo").flatten(1).double()
    along = (back - axes.centre) @ axes.axes.T
    assert float(along[:, 0].mean()) == pytest.approx(0.6, abs=0.15) and float(along[:, 1:].abs().max()) < 0.3
    assert len(torch.unique(told.examples.latents.flatten(1), dim=0)) == len(told.items)
    for moments, sentence in (
        (torch.zeros(7), "got 0"),
        (torch.full((7,), math.nan), "finite moments"),
        (torch.ones(6), "finite moments"),
    ):
        with pytest.raises(ReplyRefused, match=sentence):
            drawn.check(latent_moments.MomentsReply(
                plan_sha256=plan.sha256, site="oslo", moments={MOMENTS: moments}))  # fmt: skip


def test_the_common_style_is_left_as_it_was_entered(plan: RunPlan) -> None:
    bank: StyleBank = bank_of_styles(plan)
    common = CommonStyle.of(bank)
    there = common.into(PUBLIC, "oslo")
    assert not torch.allclose(there, PUBLIC) and torch.allclose(common.back(there, "oslo"), PUBLIC, atol=1e-4)
