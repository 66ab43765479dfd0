"""Noisy rounds on their whole way out: what one patient moves, what an attacker reads, kills, refusals."""

import math
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from client.commands.plan_words import plan_words
from client.declared import GateRefusal
from client.exchanges import private_rounds
from client.exchanges.exchange import AskRefused
from client.latents.group_batches import GroupBatches
from client.training.private import step_sum, train_privately
from client.training.site_state import SiteState, StateFolder, StateMissing
from client.training.trainee import Trainee, WrongWeights
from federation.exchanges.private_rounds import (
    PrivateAsk,
    mechanisms,
    resting_others,
    run_epsilon,
    steps_promise,
    travelling_keys,
)
from federation.exchanges.style_code import code_promise
from federation.plan.plan import RunPlan
from federation.plan.privacy_plan import NoisySteps
from federation.published_plan import PublishedPlan
from meduet_models.meduet import MeDUET
from meduet_models.style.bank import StyleBank
from privacy.accounting import Mechanism, epsilon_of
from privacy.ledger import AnsweredBefore, LedgerRefusal, Place
from privacy.randomness import SecretSource
from privacy.step_secrets import StepSecrets
from tests.worlds import Hospital, ViewedScans, protected_plan, public_latents

PUBLIC = public_latents()
FIRST = 4
CPU = torch.device("cpu")


class Killed(BaseException):
    """As if the process had ended."""


class Site(Hospital):
    """Writes a round down after each step."""

    progress_every_s: ClassVar[float] = 0.0


def make_noisy(
    make: Callable[..., RunPlan], level: Literal["adapters", "full"] = "full", **changes: Any
) -> RunPlan:
    settings: dict[str, Any] = {
        "steps": 4,
        "steps_per_round": 2,
        "sampling_rate": 0.5,
        "clip_norm": 1.0,
        "epsilon_style": 1.0,
        "although_noise_wins": True,
    }
    return protected_plan(PUBLIC, make, level=level, noisy=NoisySteps(**settings | changes))


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return make_noisy(toy_plan)


@pytest.fixture
def adapters(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return make_noisy(toy_plan, "adapters")


@pytest.fixture
def bank(plan: RunPlan, toy_bank: Callable[..., StyleBank]) -> StyleBank:
    return toy_bank(plan)


def weights(plan: RunPlan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    travels, whole = travelling_keys(plan, network), network.state_dict()
    return {n: whole[n] for n in travels}, {n: t for n, t in whole.items() if n not in travels}


def question(plan: RunPlan, style: StyleBank, round_number: int = FIRST, **changes: Any) -> PrivateAsk:
    shared, home = weights(plan)
    begins = {"home": home, "public": {"latents": PUBLIC}} if round_number == FIRST else {}
    asked: dict[str, Any] = {"shared": shared, "bank": style.to_tensors(), **begins}
    return PrivateAsk(plan_json=plan.to_json(), round=round_number, **asked | changes)


def hospital(folder: Path, patients: int = 10, ceiling: float | None = 3.0) -> Site:
    return Site(folder, ViewedScans.of([f"p{n}" for n in range(patients)]), epsilon_ceiling=ceiling)


def answered(site: Site, ask: PrivateAsk, plan: RunPlan, **more: Any) -> Any:
    return private_rounds.ANSWER.once(site, ask, plan, **more)


def key_of(folder: Path) -> Path:
    (key,) = folder.rglob("*.secret")
    return key


def test_a_round_leaves_with_its_steps_and_what_everybody_knew(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    site = hospital(tmp_path)
    released = answered(site, question(plan, bank), plan)
    assert dict(released.counts) == {"examples": 6}  # the bank's; the site has ten
    assert set(released.metrics) == {"steps", "seconds"} and released.metrics["seconds"].is_integer()
    assert any(float(tensor.abs().max()) > 0 for tensor in released.tensors.values())
    (line,) = [entry.record for entry in site.journal.entries()]
    assert line["noise"].startswith("noise enters steps: Gaussian, deviation")
    assert list(tmp_path.rglob("*.secret")) == []
    again = answered(site, question(plan, bank, home=None, public=None), plan)  # no part of the question
    assert all(torch.equal(again.tensors[n], t) for n, t in released.tensors.items())
    answered(site, question(plan, bank, FIRST + 1), plan)
    spent = site.ledger.spent()
    assert spent.num_noised == 2
    steps = replace(steps_promise(plan).mechanism, steps=4)  # type: ignore[type-var]
    assert mechanisms(plan) == [code_promise(plan).mechanism, steps]
    assert spent.total.upper < run_epsilon(plan).upper <= 3.0


@pytest.mark.parametrize("patients", [0, 1])
def test_a_site_with_few_patients_or_none_answers_in_the_same_form(
    plan: RunPlan, bank: StyleBank, tmp_path: Path, patients: int
) -> None:
    released = answered(hospital(tmp_path, patients), question(plan, bank), plan)
    assert dict(released.counts) == {"examples": 6}
    assert float(released.tensors["embed.weight"].abs().max()) > 0


# Level adapters


def test_at_level_adapters_the_output_layer_moves_and_nothing_else_leaves_or_changes_at_the_site(
    adapters: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    site, (shared, home) = hospital(tmp_path), weights(adapters)
    released = answered(site, question(adapters, bank), adapters)
    assert set(released.tensors) == set(shared) == {"decoder.predict.weight", "decoder.predict.bias"}
    assert all(float(tensor.abs().min()) > 0 for tensor in released.tensors.values())
    kept = StateFolder(tmp_path / "state", adapters.sha256).before(FIRST + 1)
    assert set(kept.home) == set(home)
    assert all(torch.equal(kept.home[name], tensor) for name, tensor in home.items())
    for name, tensor in kept.teacher.items():
        assert torch.equal(tensor, {**home, **shared}[name]) != (name in shared)
    assert {key.partition("/")[2] for key in kept.optimiser} == set(shared)
    answered(site, question(adapters, bank, FIRST + 1), adapters)
    assert site.ledger.spent().num_noised == 2


def test_at_level_adapters_the_centre_cannot_send_other_weights_than_the_output_layer(
    plan: RunPlan, adapters: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    with pytest.raises(WrongWeights, match="missing or not one of them"):
        answered(hospital(tmp_path), question(adapters, bank, shared=weights(plan)[0]), adapters)


def test_nothing_is_asked_that_the_plan_does_not_have(plan: RunPlan, bank: StyleBank, tmp_path: Path) -> None:
    for wrong in (FIRST - 1, FIRST + 2, 0):
        with pytest.raises(AskRefused, match="rounds 4 to 5"):
            answered(hospital(tmp_path), question(plan, bank, wrong), plan)


# What one patient moves


def sums(plan: RunPlan, bank: StyleBank, scans: ViewedScans, step: int = 0) -> dict[str, Tensor]:
    shared, home = weights(plan)
    trainee = Trainee.of(plan, shared, SiteState(round=0, home=home), CPU)
    resting_others(plan, trainee.student)
    batches = GroupBatches(scans, plan, bank, PUBLIC, "north", b"s" * 32)
    noise = StepSecrets(SecretSource(b"k" * 32), ("line",), 1.0)
    return step_sum(trainee, batches, batches.drawn(noise, step), "mftd", plan)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


@pytest.mark.parametrize("level", ["adapters", "full"])
@pytest.mark.parametrize("spoiled", ["as she is", "huge", "overflow", "nan", "zero"])
def test_one_patient_moves_the_sum_of_a_step_by_the_bound_whatever_her_scans_hold(
    toy_plan: Callable[..., RunPlan],
    toy_bank: Callable[..., StyleBank],
    spoiled: str,
    level: Literal["adapters", "full"],
) -> None:
    plan = make_noisy(toy_plan, level, sampling_rate=1.0, clip_norm=0.5, group_size=4)
    scans = ViewedScans.of([f"p{n // 2}" for n in range(12)])
    match spoiled:
        case "huge":
            scans.values[4:6] *= 1e4
        case "overflow":
            scans.values[4:6] *= 1e20
        case "nan":
            scans.values[4:6, ..., 0] = math.nan
        case "zero":
            scans.values[4:6] = 0.0
    bank = toy_bank(plan)
    whole = sums(plan, bank, scans)
    scans.train = [row for row in scans.train if row not in (4, 5)]
    moved = distance(whole, sums(plan, bank, scans))
    assert moved <= 0.5 * (1 + 1e-5)
    assert moved == 0 if spoiled in ("overflow", "nan") else moved > 0.4


# Attack: was she in it? By somebody who knows everybody else, the weights and all public draws.


def worlds(plan: RunPlan, bank: StyleBank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    scans = ViewedScans.of([f"p{n}" for n in range(8)])
    with_her = sums(plan, bank, scans)
    scans.train = scans.train[:-1]
    return with_her, sums(plan, bank, scans)


def auc(members: Tensor, others: Tensor) -> float:
    return float(
        (members[:, None] > others).double().mean() + (members[:, None] == others).double().mean() / 2
    )


def test_gradient_alignment_finds_a_member_without_noise_and_stays_under_the_bound_with_it(
    toy_plan: Callable[..., RunPlan], toy_bank: Callable[..., StyleBank]
) -> None:
    plan = make_noisy(toy_plan, steps=1, steps_per_round=1, sampling_rate=1.0)
    with_her, without = worlds(plan, toy_bank(plan))
    hers = {name: with_her[name] - without[name] for name in with_her}  # her cut gradient

    def scores(world: dict[str, Tensor], deviation: float) -> Tensor:
        told = []
        for trial in range(150):
            noise = StepSecrets(SecretSource(secrets.token_bytes(32)), (trial,), deviation)
            noised = noise.noised(0, world)
            told.append(sum(float((noised[n] * hers[n]).sum()) for n in hers))
        return torch.tensor(told)

    promise = steps_promise(plan)
    assert auc(scores(with_her, 0.0), scores(without, 0.0)) == 1.0
    sigma = promise.deviation / promise.bound
    bound = 0.5 * (1 + math.erf(1 / (2 * sigma)))  # Phi(1 / (sigma sqrt 2)): exact for one Gaussian
    found = auc(scores(with_her, promise.deviation), scores(without, promise.deviation))
    assert found <= bound + 4.9 * 0.034 < 1.0  # a false alarm in a million


def test_the_update_of_a_round_without_noise_gives_a_member_away(
    plan: RunPlan, bank: StyleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defence taken out: then the attack succeeds on what leaves."""
    monkeypatch.setattr(StepSecrets, "noised", lambda self, step, given: dict(given))
    whole = ViewedScans.of([f"p{n}" for n in range(8)])
    fewer = ViewedScans.of([f"p{n}" for n in range(8)])
    fewer.train = fewer.train[:-1]
    shared, home = weights(plan)
    all_in = make_noisy(lambda **parts: replace(plan, privacy=parts["privacy"]), sampling_rate=1.0)

    def update(scans: ViewedScans, key: bytes) -> Tensor:
        trainee = Trainee.of(all_in, shared, SiteState(round=0, home=home), CPU)
        noise = StepSecrets(SecretSource(key * 32), ("line",), 1.0)
        batches = GroupBatches(scans, all_in, bank, PUBLIC, "north", b"s" * 32)
        result = train_privately(trainee, batches, all_in, FIRST, noise)
        return torch.cat([tensor.flatten() for tensor in result.update.values()])

    guesses = []
    for key in (b"a", b"b", b"c", b"d"):  # masks are public: the attacker replays both worlds
        member, other = update(whole, key), update(fewer, key)
        guesses += [torch.equal(update(whole, key), member), not torch.equal(update(fewer, key), member)]
        assert float((member - other).norm()) > 1e-3
    assert all(guesses)


def test_groups_of_patients_promise_what_replacing_one_moves_and_the_ledger_counts_it_so(
    toy_plan: Callable[..., RunPlan], toy_bank: Callable[..., StyleBank], tmp_path: Path
) -> None:
    plan = make_noisy(toy_plan, partners="private", group_size=4)
    code, steps = mechanisms(plan)
    assert code.relation == steps.relation == "replace one" and 2.99 < run_epsilon(plan).upper <= 3.0
    public = make_noisy(toy_plan, group_size=4)
    assert steps.noise_multiplier > 1.2 * mechanisms(public)[1].noise_multiplier
    site, bank = hospital(tmp_path), toy_bank(plan)
    released = answered(site, question(plan, bank), plan)
    assert dict(released.counts) == {"examples": 6}
    spent = site.ledger.spent().total
    assert spent == epsilon_of([released.promise.mechanism], 1e-5)
    sentence = released.promise.sentence()
    for said in ("whether a patient or another in her place is in it", "replace one", "how many patients"):
        assert said in sentence
    assert "by at most 2 (L2" in sentence and released.promise.bound == 1.0
    words = " ".join(line for _, line in plan_words(PublishedPlan(plan=plan, bundle_sha256="0" * 64)))
    assert "groups of 4" in words and "HOW MANY PATIENTS YOU HAVE IS NOT HIDDEN" in words


# Kills, and what was lost


def killed_after(step: int) -> Callable[[int, float], None]:
    def on_step(done: int, loss: float) -> None:
        assert math.isnan(loss)
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("level", ["adapters", "full"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_round_killed_after_any_step_goes_on_to_the_same_bits(
    toy_plan: Callable[..., RunPlan],
    bank: StyleBank,
    tmp_path: Path,
    step: int,
    level: Literal["adapters", "full"],
) -> None:
    plan = make_noisy(toy_plan, level)
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(Killed):
        answered(hospital(first), question(plan, bank), plan, on_step=killed_after(step))
    assert key_of(first).stat().st_mode & 0o777 == 0o600
    shutil.copytree(first, second)
    for partial in second.rglob("*.partial.safetensors"):
        partial.unlink()  # begins anew, with the same key
    resumed, anew = (answered(hospital(f), question(plan, bank), plan) for f in (first, second))
    assert all(torch.equal(resumed.tensors[n], t) for n, t in anew.tensors.items())
    assert hospital(first).ledger.spent().num_noised == 1


def test_a_lost_key_begins_the_round_anew_with_other_noise_and_one_charge(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(Killed):
        answered(hospital(first), question(plan, bank), plan, on_step=killed_after(1))
    shutil.copytree(first, second)
    key_of(second).unlink()
    kept, lost = (answered(hospital(f), question(plan, bank), plan) for f in (first, second))
    assert not torch.equal(kept.tensors["embed.weight"], lost.tensors["embed.weight"])
    assert hospital(second).ledger.spent().num_noised == 1


def test_a_site_that_lost_an_answer_that_left_gives_no_other_noise(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    answered(hospital(tmp_path), question(plan, bank), plan)
    shutil.rmtree(tmp_path / "answers")
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(AnsweredBefore, match="this one is another"):
        answered(hospital(tmp_path), question(plan, bank), plan)


def test_other_weights_in_an_answered_place_are_refused(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    answered(hospital(tmp_path), question(plan, bank), plan)
    shared = {name: tensor + 1e-3 for name, tensor in weights(plan)[0].items()}
    with pytest.raises(AnsweredBefore, match=r"got another\. Nothing was read"):
        answered(hospital(tmp_path), question(plan, bank, shared=shared), plan)


# Bad input, each with its sentence


class Unread(Site):
    def scans(self, plan: RunPlan) -> Any:
        raise AssertionError("no scan is read")


def test_a_ceiling_that_the_round_would_pass_refuses_before_a_scan_is_read(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    with pytest.raises(LedgerRefusal, match=r"'private_round' at epsilon .*ceiling is 0.5"):
        answered(Unread(tmp_path, None, epsilon_ceiling=0.5), question(plan, bank), plan)
    assert Unread(tmp_path, None, epsilon_ceiling=0.5).ledger.verify() == 0


def test_a_site_that_missed_the_start_or_the_public_scans_asks_for_them(
    plan: RunPlan, bank: StyleBank, tmp_path: Path
) -> None:
    with pytest.raises(StateMissing):
        answered(hospital(tmp_path / "1"), question(plan, bank, home=None), plan)
    with pytest.raises(StateMissing, match="public scans; this site does not have them"):
        answered(hospital(tmp_path / "2"), question(plan, bank, public=None), plan)
    site = hospital(tmp_path / "2")
    assert answered(site, question(plan, bank), plan).counts["examples"] == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"public": {"latents": PUBLIC + 1}}, "Expected the plan's public scans .*got others"),
        ({"public": {"latents": PUBLIC[:-1]}}, "Expected public scans of"),
        ({"bank": {}}, "Expected a bank of protected styles; none came"),
    ],
)
def test_what_is_not_the_plans_is_refused(
    plan: RunPlan, bank: StyleBank, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AskRefused, match=sentence):
        answered(hospital(tmp_path), question(plan, bank, **changes), plan)


def test_a_site_whose_style_is_not_in_the_bank_takes_no_steps(
    plan: RunPlan, toy_bank: Callable[..., StyleBank], tmp_path: Path
) -> None:
    with pytest.raises(AskRefused, match="own protected style"):
        answered(hospital(tmp_path), question(plan, toy_bank(plan, ["south", "west"])), plan)


def opened_gate(site: Site, plan: RunPlan) -> Any:
    from client.books.answers import KeptAnswers
    from client.release import Gate

    place = Place(plan_sha256=plan.sha256, kind="private_round", round=FIRST)
    reservation = site.ledger.reserve(place, "a5" * 32, steps_promise(plan))
    return Gate(reservation, site.ledger, site.journal, KeptAnswers(site.state_dir / "answers"))


@pytest.mark.parametrize(
    ("beside", "taken", "sentence"),
    [
        ({}, 0, "noise in each of 2 steps; some had none"),
        ({}, 1, "noise in each of 2 steps; some had none"),
        ({"metrics": {"loss.total": 1.0}}, 2, "Expected examples, steps and whole seconds"),
        ({"metrics": {"grad_norm": 1.0}}, 2, "Expected examples, steps and whole seconds"),
        ({"metrics": {"seconds": 1.5}}, 2, "Expected examples, steps and whole seconds"),
        ({"counts": {"num_patients": 7}}, 2, "Expected examples, steps and whole seconds"),
    ],
)
def test_the_gate_lets_out_no_step_without_noise_and_nothing_exact_beside(
    plan: RunPlan, tmp_path: Path, beside: dict[str, Any], taken: int, sentence: str
) -> None:
    gate = opened_gate(hospital(tmp_path), plan)
    noise = gate.step_secrets()
    for step in range(taken):
        noise.noised(step, {"a": torch.zeros(3)})
    with pytest.raises(GateRefusal, match=sentence):
        gate.release({"a": torch.zeros(3)}, {"a": (3,)}, weight=6.0, **beside)
    assert hospital(tmp_path).journal.entries() == []


@pytest.mark.parametrize(
    ("share", "sentence"), [(0.9, "they cost 3"), (1.2, "no larger"), (0.0, "holds none")]
)
def test_a_plan_with_other_noise_than_its_epsilon_asks_for_is_refused_before_anything_is_reserved(
    plan: RunPlan, bank: StyleBank, tmp_path: Path, share: float, sentence: str
) -> None:
    assert plan.privacy is not None and plan.privacy.noisy is not None
    noisy = replace(plan.privacy.noisy, noise_multiplier=share * plan.privacy.noisy.noise_multiplier)
    other = RunPlan.from_json(replace(plan, privacy=replace(plan.privacy, noisy=noisy)).to_json())
    site = hospital(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        answered(site, question(other, bank), other)
    assert site.ledger.spent().num_noised == 0
    with pytest.raises(ValueError, match=sentence):
        plan_words(PublishedPlan(plan=other, bundle_sha256="0" * 64))


def test_sigma_of_a_plan_keeps_style_and_all_steps_within_its_epsilon(plan: RunPlan) -> None:
    code, steps = mechanisms(plan)
    assert steps.sampling_rate == 0.5 and steps.steps == 4 and code.steps == 1
    assert 2.99 < run_epsilon(plan).upper <= 3.0
    assert steps_promise(plan).mechanism == Mechanism(
        noise_multiplier=steps.noise_multiplier, sampling_rate=0.5, steps=2
    )
