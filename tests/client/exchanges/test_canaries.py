"""Canaries on their way into what leaves: they move nothing of a patient's, whatever a centre makes of them,
and whoever sees the sums without noise guesses every coin."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from audit.attacks.canaries import attack_canaries
from audit.books import Charged
from audit.cohort import Cohort
from audit.evidence import Evidence, Release
from audit.findings import Finding
from client.exchanges import private_rounds, style_code
from client.latents.group_batches import GroupBatches
from client.release import Gate
from client.training.canaries import StepCanaries
from client.training.private import step_sum, train_privately
from client.training.site_state import SiteState
from client.training.trainee import Trainee
from federation.canaries import coins, coordinates, marked_phantoms, own_weights
from federation.exchanges.private_rounds import (
    PrivateAsk,
    mechanisms,
    resting_others,
    steps_promise,
    travelling_keys,
    with_noise,
)
from federation.exchanges.style_code import CODE, StyleCodeAsk, code_promise
from federation.plan.canary_plan import AuditCanariesPlan
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from meduet_models.meduet import MeDUET
from meduet_models.style.bank import StyleBank
from privacy.randomness import SecretSource
from privacy.step_secrets import StepSecrets
from privacy.style_code import SHARE_BOUND
from tests.worlds import Hospital, ViewedScans, protected_plan, public_latents

PUBLIC = public_latents()
CPU = torch.device("cpu")
FIRST = 4
CANARIES = AuditCanariesPlan(style_code=4, steps=60, inputs=8)
SECRET = b"1" * 32


class Killed(BaseException):
    """As if the process had ended."""


class Site(Hospital):
    """Writes a round down after each step."""

    progress_every_s: ClassVar[float] = 0.0


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    noisy = NoisySteps(
        steps=4, steps_per_round=2, sampling_rate=0.5, clip_norm=1.0, epsilon_style=1.0,
        although_noise_wins=True,
    )  # fmt: skip
    return replace(protected_plan(PUBLIC, toy_plan, level="full", noisy=noisy), audit_canaries=CANARIES)


@pytest.fixture
def bank(plan: RunPlan, toy_bank: Callable[..., StyleBank]) -> StyleBank:
    return toy_bank(plan)


def trainee_of(plan: RunPlan) -> Trainee:
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    travels, whole = travelling_keys(plan, network), network.state_dict()
    home = {n: t for n, t in whole.items() if n not in travels}
    return Trainee.of(plan, {n: whole[n] for n in travels}, SiteState(round=0, home=home), CPU)


def noise_of(deviation: float = 1.0, key: bytes = b"k") -> StepSecrets:
    return StepSecrets(SecretSource(key * 32), ("line",), deviation)


def canaries_of(plan: RunPlan, bank: StyleBank, secret: bytes = SECRET) -> StepCanaries:
    return StepCanaries(plan, secret, bank, PUBLIC, "north")


def length(one: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in one.values()))


def question(plan: RunPlan, bank: StyleBank, round_number: int = FIRST) -> PrivateAsk:
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    travels, whole = travelling_keys(plan, network), network.state_dict()
    begins: dict[str, Any] = {}
    if round_number == FIRST:
        home = {n: t for n, t in whole.items() if n not in travels}
        begins = {"home": home, "public": {"latents": PUBLIC}}
    shared = {n: whole[n] for n in travels}
    return PrivateAsk(
        plan_json=plan.to_json(), round=round_number, shared=shared, bank=bank.to_tensors(), **begins
    )


def hospital(folder: Path, patients: int = 10) -> Site:
    return Site(folder, ViewedScans.of([f"p{n}" for n in range(patients)]), epsilon_ceiling=3.0)


# Nothing of a patient's changes


def test_a_steps_sum_with_canaries_is_that_of_the_patients_to_the_bit_and_canaries_beside_it(
    plan: RunPlan, bank: StyleBank
) -> None:
    """What reaches the noise in the first step of a round, with canaries and without; the noise is the
    same."""
    seen: list[dict[str, Tensor]] = []

    class Watched(StepSecrets):
        def noised(self, step: int, sums: Any) -> dict[str, Tensor]:
            if step == 0:
                seen.append(dict(sums))
            return super().noised(step, sums)

    scans = ViewedScans.of([f"p{n}" for n in range(10)])
    batches = GroupBatches(scans, plan, bank, PUBLIC, "north", SECRET)
    for beside in (None, canaries_of(plan, bank)):
        noise = Watched(SecretSource(b"k" * 32), ("line",), 1.0)
        train_privately(trainee_of(plan), batches, plan, FIRST, noise, canaries=beside)
    turn = batches.turn(FIRST, 0)
    added = canaries_of(plan, bank).step_sum(_rested(plan), noise_of(), 0, turn)
    assert length(added) > 1.0
    without, within = seen
    assert all(torch.equal(within[name], patients + added[name]) for name, patients in without.items())
    drawn = [noise_of().noised(0, {n: torch.zeros_like(t) for n, t in one.items()}) for one in seen]
    assert all(torch.equal(drawn[1][name], noise) for name, noise in drawn[0].items())


def _rested(plan: RunPlan) -> Trainee:
    trainee = trainee_of(plan)
    resting_others(plan, trainee.student)
    return trainee


def test_a_patients_draws_and_group_are_the_same_bits_beside_canaries(plan: RunPlan, bank: StyleBank) -> None:
    scans = ViewedScans.of([f"{n}" for n in range(10)])  # named as canaries are
    batches = GroupBatches(scans, plan, bank, PUBLIC, "north", SECRET)
    for step in range(3):
        noise = noise_of()
        before = batches.drawn(noise, step)
        beside = canaries_of(plan, bank)
        beside.step_sum(_rested(plan), noise, step, "mftd")
        after = batches.drawn(noise, step)
        assert [(g.scans, g.public.tolist()) for g in before] == [(g.scans, g.public.tolist()) for g in after]
        assert all(
            torch.equal(a.step.exchanged, b.step.exchanged) for a, b in zip(before, after, strict=True)
        )
        mine = [noise.of_patient(step, str(n)).uniforms(1)[0] for n in range(10)]
        theirs = [noise.apart("canaries").of_patient(step, str(n)).uniforms(1)[0] for n in range(10)]
        assert not set(mine) & set(theirs)


def test_promises_and_the_charge_are_the_same_with_canaries_and_without(plan: RunPlan) -> None:
    without = replace(plan, audit_canaries=None)
    assert mechanisms(plan) == mechanisms(without)
    assert steps_promise(plan) == steps_promise(without) and code_promise(plan) == code_promise(without)


# Attack: a centre that sets canaries to learn of patients


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whatever_seed_and_number_a_centre_chooses_one_patient_moves_a_step_by_the_bound(
    plan: RunPlan, bank: StyleBank, seed: int
) -> None:
    canaries = AuditCanariesPlan(style_code=0, steps=(200, 2, 40)[seed], inputs=(0, 20, 8)[seed])
    plan = replace(plan, seed=seed, audit_canaries=canaries)
    scans = ViewedScans.of([f"p{n}" for n in range(6)])
    scans.values[5] *= (1.0, 1e4, math.nan)[seed]

    def whole(noise: StepSecrets) -> dict[str, Tensor]:
        trainee = _rested(plan)
        batches = GroupBatches(scans, plan, bank, PUBLIC, "north", SECRET)
        own = step_sum(trainee, batches, batches.drawn(noise, 0), "mftd", plan)
        added = canaries_of(plan, bank).step_sum(trainee, noise, 0, "mftd")
        return {name: tensor + added[name] for name, tensor in own.items()}

    for key in (b"a", b"b"):
        with_her = whole(noise_of(key=key))
        scans.train = [0, 1, 2, 3, 4]
        without = whole(noise_of(key=key))
        scans.train = [0, 1, 2, 3, 4, 5]
        assert length({n: with_her[n] - without[n] for n in with_her}) <= 1 + 1e-5


def test_canaries_add_public_vectors_and_coins_and_nothing_else(plan: RunPlan, bank: StyleBank) -> None:
    """So no patient is in them: other scans, the same bits; a canary's share is at most a patient's bound."""
    ten, two = (canaries_of(plan, bank).step_sum(_rested(plan), noise_of(), 1, "siqc") for _ in (10, 2))
    assert all(torch.equal(ten[name], two[name]) for name in ten)
    alone = replace(plan, audit_canaries=AuditCanariesPlan(steps=60))
    added = canaries_of(alone, bank).step_sum(_rested(alone), noise_of(), 1, "siqc")
    values = torch.cat([tensor.flatten() for tensor in added.values()])
    inside = sum(coins(SECRET, alone, "steps"))
    drawn = int((values != 0).sum())
    assert set(values.unique().tolist()) == {0.0, 1.0} and 0 < drawn < inside < 60
    marked = replace(plan, audit_canaries=AuditCanariesPlan(inputs=2))
    for seed in range(20):  # at most two groups
        noise = noise_of(key=bytes([seed]))
        assert length(canaries_of(marked, bank).step_sum(_rested(marked), noise, 0, "mftd")) <= 2 + 1e-5


class OpenGate(Gate):
    """Takes down what comes to it."""

    def __init__(self) -> None:
        self.exact: dict[str, Tensor] = {}

    def release(self, tensors: Any, *declared: Any, **more: Any) -> Any:
        self.exact = dict(tensors)
        raise Killed


def exact_code(plan: RunPlan, folder: Path, scans: ViewedScans) -> Tensor:
    """The style code as it comes to the gate, without noise."""
    gate, site = OpenGate(), Hospital(folder, scans, epsilon_ceiling=3.0)
    ask = StyleCodeAsk(plan_json=plan.to_json(), public={"latents": PUBLIC})
    with pytest.raises(Killed):
        style_code.answer_style_code(site, ask, plan, gate, lambda step, loss: None)
    return gate.exact[CODE]


def test_the_style_code_holds_shares_of_the_bound_along_own_axes_and_none_in_the_count(
    plan: RunPlan, tmp_path: Path
) -> None:
    scans = ViewedScans.of([f"p{n}" for n in range(8)])
    told = {
        name: exact_code(one, tmp_path / name, scans)
        for name, one in {"with": plan, "without": replace(plan, audit_canaries=None)}.items()
    }
    moved = told["with"] - told["without"]
    inside = coins(SECRET, plan, "style_code")
    assert moved.numpy() == pytest.approx([SHARE_BOUND * coin for coin in inside] + [0.0], abs=1e-12)


# Coins


def test_coins_are_fair_the_sites_own_and_the_same_after_a_kill(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    many = replace(plan, audit_canaries=AuditCanariesPlan(steps=200))
    thrown = np.array([coins(bytes([n]) * 32, many, "steps") for n in range(20)])
    assert abs(thrown.mean() - 0.5) < 0.05 and len({tuple(one) for one in thrown.tolist()}) == 20
    assert coins(SECRET, plan, "steps") != coins(SECRET, replace(plan, seed=8), "steps")

    def dies(done: int, loss: float) -> None:
        if done == 1:
            raise Killed

    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(Killed):
        private_rounds.ANSWER.once(hospital(first), question(plan, bank), plan, on_step=dies)
    shutil.copytree(first, second)
    for partial in second.rglob("*.partial.safetensors"):
        partial.unlink()
    resumed, anew = (
        private_rounds.ANSWER.once(hospital(folder), question(plan, bank), plan) for folder in (first, second)
    )
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in anew.tensors.items())
    spent = hospital(first).ledger.spent()
    assert spent.num_noised == 1 and spent.total.upper <= 3.0
    books = (first / "journal.jsonl").read_text() + (first / "ledger.jsonl").read_text()
    assert "coin" not in books


def test_each_canary_has_a_weight_of_its_own_and_a_mark_that_no_scan_has(plan: RunPlan) -> None:
    weights = own_weights(plan, MeDUET(plan.network, len(plan.sites), seed=0))
    own = coordinates(plan, weights).tolist()
    assert len(set(own)) == 60 and torch.equal(coordinates(plan, weights), torch.tensor(own))
    phantoms = marked_phantoms(plan, PUBLIC)
    changed = (phantoms[:, None] != PUBLIC[None]).flatten(2).double().mean(2).min(1).values
    assert len(phantoms) == 8 and torch.all((changed > 0.1) & (changed < 0.2))


# Attack: whose coin came up


def round_of(plan: RunPlan, bank: StyleBank, deviation: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A round with this noise: the weights before it, and the update."""
    trainee = trainee_of(plan)
    scans = ViewedScans.of([f"p{n}" for n in range(10)])
    batches = GroupBatches(scans, plan, bank, PUBLIC, "north", SECRET)
    noise = noise_of(deviation, b"z")
    result = train_privately(trainee, batches, plan, FIRST, noise, canaries=canaries_of(plan, bank))
    return dict(trainee.shared), result.update


def found(
    plan: RunPlan, kind: str, tensors: dict[str, Tensor], charged: float, **more: Any
) -> dict[str, Finding]:
    own = {one: coins(SECRET, plan, one) for one in ("style_code", "steps", "inputs")}  # type: ignore[arg-type]
    record = {
        "kind": kind,
        "round": FIRST if kind == "private_round" else 0,
        "plan": plan.sha256,
        "sha256": "0",
    }
    release = Release("north", record, tensors)
    evidence = Evidence(
        "toy", plan, {}, [release], more.pop("cohorts", {}), {}, coins={"north": own}, public=PUBLIC, **more
    )
    made = attack_canaries(evidence, [release, release], Charged(charged, 1e-5))
    return {finding.attack: finding for finding in made}


def test_an_update_without_noise_gives_the_coins_away_and_with_it_shows_less_than_is_promised(
    plan: RunPlan, bank: StyleBank
) -> None:
    alone = replace(plan, audit_canaries=AuditCanariesPlan(steps=200))
    alone = with_noise(replace(alone, privacy=replace(plan.privacy, noisy=_all_in(plan))))  # type: ignore[type-var]
    promise = steps_promise(alone)
    for deviation, lower in ((1e-3, 1.0), (promise.deviation, 0.0)):
        _, update = round_of(alone, bank, deviation)
        told = found(alone, "private_round", update, 1.0)["canaries"]
        assert told.canaries is not None and told.epsilon_low is not None
        if lower:
            assert told.epsilon_low > lower and told.verdict == "found"
            assert "MORE THAN THE 1.00 THAT IS PROMISED" in told.sentence
        else:
            assert told.epsilon_low < 1.0 and told.verdict == "not found"
        assert told.canaries.releases == 1 and told.canaries.ceiling > 3.0


def _all_in(plan: RunPlan) -> NoisySteps:
    assert plan.privacy is not None and plan.privacy.noisy is not None
    return replace(plan.privacy.noisy, sampling_rate=1.0, steps=2, noise_multiplier=0.0)


def test_marked_phantoms_are_read_by_their_loss_and_not_audited_without_the_weights_before(
    plan: RunPlan, bank: StyleBank
) -> None:
    alone = replace(plan, audit_canaries=AuditCanariesPlan(inputs=24))
    alone = with_noise(replace(alone, privacy=replace(plan.privacy, noisy=_all_in(plan))))  # type: ignore[type-var]
    before, update = round_of(alone, bank, 1e-6)

    def networks(release: Release) -> Any:
        made = []
        for move in (0.0, 1.0):
            network = MeDUET(alone.network, len(alone.sites), seed=alone.seed)
            own = network.state_dict()
            moved = {n: t + move * update[n] for n, t in before.items()}
            network.load_state_dict(own | moved)
            made.append(network.eval().requires_grad_(False))
        return tuple(made)

    told = found(alone, "private_round", update, 8.0, before_after=networks)["input_canaries"]
    assert told.canaries is not None and told.verdict == "under-powered"
    missing = found(alone, "private_round", update, 8.0)
    assert missing["none"].verdict == "not audited" and "the centre has them" in missing["none"].sentence


def test_a_style_code_without_noise_gives_the_coins_away(plan: RunPlan, tmp_path: Path) -> None:
    scans = ViewedScans.of([f"p{n}" for n in range(8)])
    exact = {CODE: exact_code(plan, tmp_path, scans)}
    cohort = Cohort("north", scans.values[:, 0], tuple(scans.patients), (True,) * 8)
    told = found(plan, "style_code", exact, 1.0, cohorts={"north": cohort})["canaries"]
    assert told.canaries is not None and told.canaries.right[-1] >= 3  # of four
    assert told.verdict == "under-powered"
    assert "So few could not have contradicted the promise" in told.sentence
