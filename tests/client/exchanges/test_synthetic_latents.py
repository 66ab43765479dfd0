"""Synthetic latents on their whole way out: what one patient moves, what an attacker reads, refusals."""

import dataclasses
import math
import secrets
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit.attacks.memorisation import copying
from client.declared import GateRefusal
from client.exchanges import latents, synthetic_latents
from client.exchanges.exchange import AskRefused
from client.release import Gate
from client.training.private_diffusion import HomeScans, step_sum, train_at_home
from federation.exchanges.latents import LatentsAsk, LatentsReply, opened
from federation.exchanges.synthetic_latents import (
    SyntheticAsk,
    home_transformer,
    synthetic_of,
    synthetic_promise,
    synthetic_shapes,
)
from federation.plan.latent_privacy import SyntheticPlan
from federation.plan.plan import RunPlan
from federation.wire.sealing import recipient_key
from federation.wire.wire import RefusalKind
from meduet_models.diffusion.conditions import Conditions, ConditionSizes
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.diffusion.velocity import VelocityLoss
from privacy.ledger import AnsweredBefore, LedgerRefusal
from privacy.randomness import SecretSource
from privacy.sample_gradients import per_sample_gradients
from privacy.step_secrets import StepSecrets
from tests.rounds.noised import bank_of_styles, the_plan
from tests.worlds import BANK_KEY, Hospital, ViewedScans

CUT = 0.01  # below everybody's gradient


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return the_plan("synthetic")


def started(plan: RunPlan, seed: int = 0) -> DiffusionTransformer:
    """A network at home whose prediction is not zero, so that every weight has a gradient."""
    network, draws = home_transformer(plan), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
    return network


def question(plan: RunPlan, **changes: Any) -> SyntheticAsk:
    values: dict[str, Any] = {
        "start": started(plan).state_dict(),
        "bank": bank_of_styles(plan).to_tensors(),
        "round": 2,
    }
    return SyntheticAsk(plan_json=plan.to_json(), **values | changes)


def hospital(folder: Path, patients: int = 40, ceiling: float | None = 8.0) -> Hospital:
    names = [f"p{n // 2}" for n in range(2 * patients)]  # two scans each
    return Hospital(folder, ViewedScans.of(names), "oslo", epsilon_ceiling=ceiling)


@pytest.mark.parametrize("patients", [0, 1, 40])
def test_as_many_samples_as_the_plan_says_leave_sealed_and_nothing_beside_them(
    plan: RunPlan, tmp_path: Path, patients: int
) -> None:
    site, ask = hospital(tmp_path, patients), question(plan)
    released = synthetic_latents.ANSWER.once(site, ask, plan)
    assert released.tensors["latents"].shape == (6, 2, 4, 6, 4)
    assert dict(released.counts) == {} == dict(released.metrics) and released.promise.noise_in == "generation"
    mail = synthetic_latents.synthetic_mail(released, ask, "oslo")
    told = opened(LatentsReply.from_record(mail.to_record()), recipient_key(BANK_KEY))
    assert torch.equal(told.examples.latents, released.tensors["latents"])
    assert told.total == len(told.items) == 6 and told.examples.spacing.isnan().all()
    assert told.examples.site.tolist() == [0] * 6 and told.examples.category.tolist() == [-1] * 6
    again = synthetic_latents.ANSWER.once(site, ask, plan)
    assert torch.equal(again.tensors["latents"], released.tensors["latents"])
    assert site.ledger.spent().num_noised == 1


def test_another_network_in_an_answered_place_is_refused(plan: RunPlan, tmp_path: Path) -> None:
    site = hospital(tmp_path, 2)
    synthetic_latents.ANSWER.once(site, question(plan), plan)
    with pytest.raises(AnsweredBefore, match="Nothing was read"):
        synthetic_latents.ANSWER.once(site, question(plan, start=started(plan, 1).state_dict()), plan)


class Unread(Hospital):
    def scans(self, plan: RunPlan) -> Any:
        raise AssertionError("no scan is read")


@pytest.mark.parametrize("wrong", ["shape", "missing", "deviation", "bank", "raw", "ceiling"])
def test_what_is_not_the_plans_is_refused_before_a_scan_is_read(
    plan: RunPlan, tmp_path: Path, wrong: str
) -> None:
    ask, site = question(plan), Unread(tmp_path, None, "oslo", epsilon_ceiling=8.0)
    match wrong:
        case "shape":
            ask.start["predict.bias"] = torch.zeros(3)
        case "missing":
            del ask.start["predict.bias"]
        case "deviation":
            ask.start["latent_deviation"] = torch.zeros(2)
        case "bank":
            ask.bank["count"][0] = 0
        case "raw":
            raw = LatentsAsk(plan_json=plan.to_json(), round=2, first=0, count=1)
            with pytest.raises(AskRefused, match=r"release latents; its policy is synthetic|no round"):
                latents.ANSWER.once(site, raw, plan)
            return
        case "ceiling":
            site = Unread(tmp_path, None, "oslo", epsilon_ceiling=1.0)
            with pytest.raises(LedgerRefusal, match=r"'synthetic_latents' at epsilon .*ceiling is 1"):
                synthetic_latents.ANSWER.once(site, ask, plan)
            return
    with pytest.raises(AskRefused, match=r"^Expected ") as refused:
        synthetic_latents.ANSWER.once(site, ask, plan)
    assert refused.value.kind is RefusalKind.MALFORMED


def test_the_gate_lets_no_samples_out_beside_a_number_or_before_every_step_had_its_noise(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hasty(network: Any, home: Any, synthetic: SyntheticPlan, noise: StepSecrets, on_step: Any) -> None:
        noise.noised(0, {"weight": torch.zeros(1)})

    original = Gate.release
    monkeypatch.setattr(synthetic_latents, "train_at_home", hasty)
    with pytest.raises(GateRefusal, match="noise in each of 3 steps; some had none"):
        synthetic_latents.ANSWER.once(hospital(tmp_path / "hasty", 2), question(plan), plan)
    monkeypatch.undo()
    for beside in ({"metrics": {"seconds": 1.0}}, {"counts": {"examples": 2}}):
        monkeypatch.setattr(Gate, "release", partial_release(original, beside))
        with pytest.raises(GateRefusal, match="nothing beside samples"):
            synthetic_latents.ANSWER.once(hospital(tmp_path / min(beside), 2), question(plan), plan)


def partial_release(original: Any, beside: dict[str, Any]) -> Any:
    return lambda self, *given, **named: original(self, *given, **named | beside)


# What one patient moves


def sums(
    plan: RunPlan, held: ViewedScans, synthetic: SyntheticPlan, key: bytes = b"k", step: int = 0
) -> dict[str, Tensor]:
    network = started(plan).train()
    noise = StepSecrets(SecretSource(key * 32), ("line",), 1.0)
    return step_sum(network, HomeScans(held, lambda latents: latents), synthetic, noise, step)


def everybody(plan: RunPlan) -> SyntheticPlan:
    return dataclasses.replace(synthetic_of(plan), sampling_rate=1.0, clip_norm=CUT)


def scans(patients: int = 5, without: int | None = None, factor: float = 1.0) -> ViewedScans:
    held = ViewedScans.of([f"p{n // 2}" for n in range(2 * patients)])
    held.values[-2:] *= factor
    held.train = [row for row in held.train if without is None or row // 2 != without]
    return held


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


@pytest.mark.parametrize("factor", [1.0, 1e6, 1e30, math.nan, math.inf, 0.0])
def test_one_patient_moves_the_sum_of_a_step_by_the_bound_whatever_her_scans_hold(
    plan: RunPlan, factor: float
) -> None:
    synthetic = everybody(plan)
    with_her = sums(plan, scans(factor=factor), synthetic)
    moved = distance(with_her, sums(plan, scans(without=4), synthetic))
    replaced = distance(with_her, sums(plan, scans(factor=-1.0), synthetic))
    assert moved <= CUT * (1 + 1e-5) and replaced <= 2 * CUT * (1 + 1e-5)
    assert (moved < 1e-7) == (not factor < 1e30)  # she counts as zero; others' rounding is left


def test_cutting_the_mean_gradient_of_a_step_bounds_nobody(plan: RunPlan) -> None:
    """The defence taken out: the whole gradient of a step is cut, as training without privacy does."""
    network, loss = started(plan).train(), VelocityLoss()

    def cut_mean(held: ViewedScans) -> dict[str, Tensor]:
        network.zero_grad()
        data, draws = held.latents(held.train), torch.Generator().manual_seed(0)
        noise = torch.randn(10, *data.shape[1:], generator=draws)[: len(data)]
        time = torch.rand(10, generator=draws)[: len(data)]
        loss(network, data, noise, time).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), CUT)
        return {
            n: p.grad.clone() * len(data) / 2 for n, p in network.named_parameters() if p.grad is not None
        }

    assert distance(cut_mean(scans(factor=5.0)), cut_mean(scans(without=4))) > 1.5 * CUT


def test_who_is_in_a_step_and_how_she_is_seen_does_not_depend_on_who_else_is_there(plan: RunPlan) -> None:
    synthetic, shares = dataclasses.replace(synthetic_of(plan), sampling_rate=0.5), []
    for step in range(6):
        alone = scans()
        alone.train = alone.train[-2:]
        hers = sums(plan, alone, synthetic, step=step)
        whole, others = (sums(plan, held, synthetic, step=step) for held in (scans(), scans(without=4)))
        assert distance({n: whole[n] - others[n] for n in hers}, hers) < 1e-6
        shares.append(distance(hers, {n: torch.zeros_like(t) for n, t in hers.items()}))
    assert min(shares) == 0 < max(shares) <= synthetic.clip_norm


def test_a_network_that_is_told_something_has_nulls_without_a_gradient_per_sample_and_is_refused(
    plan: RunPlan,
) -> None:
    config = dataclasses.replace(home_transformer(plan).config, sizes=ConditionSizes(style=4))
    told, loss = DiffusionTransformer(config, seed=0).train(), VelocityLoss()
    data = torch.randn(3, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"gradients of each trainable parameter; \S*(null|embed_condition)"):
        per_sample_gradients(loss, told, partial(loss, told, data, data, torch.rand(3)), 3)
    home = home_transformer(plan).train()
    gradients = per_sample_gradients(loss, home, partial(loss, home, data, data, torch.rand(3)), 3)
    assert set(gradients) == {name for name, _ in home.named_parameters()}


# Attacks


def auc(members: Tensor, others: Tensor) -> float:
    return float(
        (members[:, None] > others).double().mean() + (members[:, None] == others).double().mean() / 2
    )


def test_gradient_alignment_finds_a_member_without_noise_and_stays_under_the_bound_with_it(
    plan: RunPlan,
) -> None:
    """By whoever knows everybody else, the network and her scan, and sees the noisy sums themselves."""
    synthetic = everybody(plan)
    with_her, without = sums(plan, scans(), synthetic), sums(plan, scans(without=4), synthetic)
    hers = {name: with_her[name] - without[name] for name in with_her}
    sigma = synthetic_promise(plan).deviation / synthetic_promise(plan).bound

    def scores(world: dict[str, Tensor], deviation: float) -> Tensor:
        told = []
        for trial in range(60):
            noise = StepSecrets(SecretSource(secrets.token_bytes(32)), (trial,), deviation)
            noised = noise.noised(0, world)
            told.append(sum(float((noised[n] * hers[n]).sum()) for n in hers))
        return torch.tensor(told)

    assert auc(scores(with_her, 0.0), scores(without, 0.0)) == 1.0
    bound = 0.5 * (1 + math.erf(1 / (2 * sigma)))
    found = auc(scores(with_her, sigma * CUT), scores(without, sigma * CUT))
    assert found <= bound + 4.9 * 0.053  # a false alarm in a million


def test_samples_of_a_model_without_clip_and_noise_give_its_patients_away_and_those_with_noise_do_not(
    plan: RunPlan,
) -> None:
    """Three patients; is a sample nearer to one of them than to any of three who were never there?"""
    draws = torch.Generator().manual_seed(5)
    people = torch.randn(6, 1, 2, 4, 6, 4, generator=draws) + 3 * torch.randn(
        6, 1, 2, 1, 1, 1, generator=draws
    )
    held = ViewedScans.of(["a", "b", "c"])
    held.values = people[:3]

    def samples(clip_norm: float, deviation: float, steps: int) -> Tensor:
        synthetic = dataclasses.replace(
            synthetic_of(plan), sampling_rate=1.0, clip_norm=clip_norm, steps=steps, expected_patients=3,
            learning_rate=0.03, average=0.5,
        )  # fmt: skip
        network = home_transformer(plan)
        network.latent_deviation.fill_(3.0)
        noise = StepSecrets(SecretSource(b"n" * 32), ("line",), deviation)
        train_at_home(network, HomeScans(held, lambda latents: latents), synthetic, noise)
        return sample(network, Conditions(), 40, SamplingSettings(steps=8), seed=1)

    member, other = people[:3].flatten(1), people[3:].flatten(1)
    exact = copying(samples(1e6, 0.0, 60).flatten(1), member, other, dealings=19)
    assert exact.excess > 0.3 and exact.ratio < 0.9
    sigma = synthetic_promise(plan).deviation / synthetic_promise(plan).bound
    noised = copying(samples(CUT, sigma * CUT, 3).flatten(1), member, other, dealings=19)
    assert noised.excess < exact.excess - 0.2


def test_samples_are_finite_and_bounded_by_the_plans_clip(plan: RunPlan, tmp_path: Path) -> None:
    ask = question(plan)
    ask.start["latent_deviation"] = torch.full((2,), 1e6)
    released = synthetic_latents.ANSWER.once(hospital(tmp_path, 2), ask, plan)
    told = released.tensors["latents"]
    assert set(released.tensors) == set(synthetic_shapes(plan))
    assert float(told.flatten(1).square().mean(1).sqrt().max()) <= 10.0 * (1 + 1e-6)
