"""Fine-tuning with privacy on its whole way out: what one patient moves, what an attacker reads, kills,
refusals."""

import dataclasses
import math
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.exchanges import finetuning as exchange
from client.exchanges.exchange import Answer, AskRefused
from client.exchanges.pretraining import train_mail
from client.latents.labelled import labelled_scans
from client.latents.whole_labelled import WholeScan
from client.training.private_finetuning import answerable, step_sum
from federation.exchanges.finetuning import (
    FINETUNING,
    FinetuneAsk,
    FinetunePlan,
    LocalFinetuning,
)
from federation.plan.finetuning_privacy import (
    FinetunePrivacy,
    all_rounds,
    round_mechanism,
    round_promise,
    with_noise,
)
from federation.plan.plan import RunPlan
from meduet_models.downstream.networks import PretrainedNetwork, trained_keys
from meduet_models.downstream.task import Task
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from privacy.ledger import AnsweredBefore, LedgerRefusal
from privacy.randomness import SecretSource
from privacy.step_secrets import StepSecrets
from server.exchanges.finetuning import pretrained_sha256
from tests.worlds import Hospital, KnownScans

ROW = Answer(FINETUNING, exchange.answer_finetuning, train_mail)
PRIVACY = FinetunePrivacy(
    epsilon=3.0, clip_norm=0.5, sampling_rate=0.5, expected_patients=9, although_noise_wins=True
)
SEX = LocalFinetuning(task="classification", classes=2, encoder="frozen", steps=2, batch_size=3)


class Killed(BaseException):
    """As if the process had ended."""


class Scans(KnownScans):
    """Patients of known sex, two scans of each, with label volumes as well."""

    def __init__(self, patients: int = 5) -> None:
        super().__init__(0, 2 * patients, labelled=2 * patients)
        self.patients = [f"p{n // 2}" for n in range(2 * patients)]
        self.covariates = [{"sex": "FM"[n // 2 % 2]} for n in range(2 * patients)]


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return toy_plan()


def agreed(plan: RunPlan, local: LocalFinetuning = SEX, **changes: Any) -> FinetunePlan:
    named = {"target": "sex", "target_values": ("F", "M")} if local.task == "classification" else {}
    settings: dict[str, Any] = {"rounds": 2, "privacy": PRIVACY, **named, **changes}
    sha256 = pretrained_sha256(FactorNetwork(plan.network, seed=5))
    return with_noise(FinetunePlan(run_sha256=plan.sha256, pretrained_sha256=sha256, local=local, **settings))


def network_of(plan: RunPlan, local: LocalFinetuning) -> PretrainedNetwork:
    trainable = local.encoder == "finetuned"
    pretrained = FactorNetwork(plan.network, seed=5)
    return task_of(local.task).network(pretrained, local.classes, trainable=trainable, seed=0)


def question(plan: RunPlan, finetuning: FinetunePlan, round_number: int = 1, **changes: Any) -> FinetuneAsk:
    network = network_of(plan, finetuning.local)
    tensors, trained = network.state_dict(), trained_keys(network)
    values = {
        "shared": {n: tensors[n].clone() for n in trained},
        "fixed": {n: t.clone() for n, t in tensors.items() if n not in trained},
    }
    return FinetuneAsk(
        plan_json=plan.to_json(), finetuning_json=finetuning.to_json(), round=round_number, **values | changes
    )


def hospital(folder: Path, patients: int = 5, ceiling: float | None = 3.0, scans: Any = None) -> Hospital:
    return Hospital(folder, Scans(patients) if scans is None else scans, epsilon_ceiling=ceiling)


def test_a_round_leaves_with_what_everybody_knew_and_all_rounds_cost_the_plans_epsilon(
    plan: RunPlan, tmp_path: Path
) -> None:
    finetuning, site = agreed(plan), hospital(tmp_path)
    released = ROW.once(site, question(plan, finetuning), plan)
    assert dict(released.counts) == {"examples": 9}  # the plan's; the site has five
    assert set(released.metrics) == {"steps", "seconds"} and released.metrics["seconds"].is_integer()
    assert set(released.tensors) == {"head.weight", "head.bias"}
    (line,) = [entry.record for entry in site.journal.entries()]
    assert line["noise"].startswith("noise enters steps: Gaussian, deviation")
    assert list(tmp_path.rglob("*.secret")) == []
    again = ROW.once(site, question(plan, finetuning), plan)
    assert all(torch.equal(again.tensors[n], t) for n, t in released.tensors.items())
    ROW.once(site, question(plan, finetuning, 2), plan)
    spent = site.ledger.spent()
    assert spent.num_noised == 2
    assert 2.99 < spent.total.upper == all_rounds(finetuning).upper <= 3.0


def test_a_fine_tuning_without_privacy_is_refused_at_the_same_ceiling(plan: RunPlan, tmp_path: Path) -> None:
    with pytest.raises(LedgerRefusal, match="ceiling is 3"):
        ROW.once(hospital(tmp_path), question(plan, exact := agreed(plan, privacy=None)), plan)
    assert exact.sha256 != agreed(plan).sha256


@pytest.mark.parametrize("patients", [0, 1])
def test_a_site_with_few_labelled_patients_or_none_answers_in_the_same_form(
    plan: RunPlan, tmp_path: Path, patients: int
) -> None:
    released = ROW.once(hospital(tmp_path, patients), question(plan, agreed(plan)), plan)
    assert dict(released.counts) == {"examples": 9}
    assert float(released.tensors["head.weight"].abs().max()) > 0


def test_a_label_that_is_none_of_the_plans_refuses_no_round(plan: RunPlan, tmp_path: Path) -> None:
    """A refusal would tell, exactly, that somebody has such a label."""
    local, scans = dataclasses.replace(SEX, task="segmentation"), Scans()
    scans.label[0] = 7
    released = ROW.once(hospital(tmp_path, scans=scans), question(plan, agreed(plan, local)), plan)
    assert dict(released.counts) == {"examples": 9}
    found = answerable(task_of("segmentation"), labelled_scans(scans, range(10), local), 2)
    assert found is not None and found.patient == tuple(scans.patients[1:])


# What one patient moves


def sums(plan: RunPlan, finetuning: FinetunePlan, scans: KnownScans, key: bytes = b"k") -> dict[str, Tensor]:
    network = network_of(plan, finetuning.local).train()
    rows = [row for row in range(len(scans.patients)) if scans.patients[row]]
    found = labelled_scans(scans, rows, finetuning.local, finetuning.target, finetuning.target_values)
    return step_sum(network, found, finetuning, StepSecrets(SecretSource(key * 32), ("line",), 1.0), 0, 0.25)


def without_last(scans: KnownScans) -> KnownScans:
    """The same scans, and the last patient is not there."""
    scans.patients = [name if name != max(scans.patients) else "" for name in scans.patients]
    return scans


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


@pytest.mark.parametrize("spoiled", ["as she is", "huge", "nan", "zero"])
@pytest.mark.parametrize(
    "local", [SEX, LocalFinetuning(task="segmentation", classes=2, steps=1, batch_size=2)]
)
def test_one_patient_moves_the_sum_of_a_step_by_the_bound_whatever_her_scans_hold(
    plan: RunPlan, local: LocalFinetuning, spoiled: str
) -> None:
    bound = 0.01  # below everybody's gradient
    privacy = dataclasses.replace(PRIVACY, sampling_rate=1.0, clip_norm=bound)
    finetuning, scans = agreed(plan, local, privacy=privacy), Scans()
    factor = {"as she is": 1.0, "huge": 1e6, "nan": math.nan, "zero": 0.0}[spoiled]
    scans.values[8:] *= factor
    moved = distance(sums(plan, finetuning, scans), sums(plan, finetuning, without_last(scans)))
    assert moved <= bound * (1 + 1e-5)
    assert moved == 0 if spoiled == "nan" else moved > 0.9 * bound


def test_cutting_the_mean_gradient_of_a_step_bounds_nobody(plan: RunPlan) -> None:
    """The defence taken out: the step's whole gradient is cut, as fine-tuning without privacy does."""
    bound, scans, network = 0.01, Scans(), network_of(plan, SEX)

    def cut_mean(own: KnownScans) -> dict[str, Tensor]:
        rows = [row for row in range(10) if own.patients[row]]
        found = labelled_scans(own, rows, SEX, "sex", ("F", "M"))
        network.zero_grad()
        task_of("classification").loss(network(found.latents), found.answers).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in network.parameters() if p.requires_grad], bound)
        known = network.named_parameters()
        return {n: p.grad.clone() * len(rows) / 2 for n, p in known if p.grad is not None}  # type: ignore[union-attr]

    assert distance(cut_mean(scans), cut_mean(without_last(scans))) > 1.5 * bound


def test_who_is_in_a_step_and_which_scan_of_hers_does_not_depend_on_who_else_is_there(plan: RunPlan) -> None:
    finetuning = agreed(plan)
    shares = []
    for key in (b"a", b"b", b"c", b"d", b"e", b"f"):
        hers = Scans()
        hers.patients = [name if name == "p4" else "" for name in hers.patients]
        alone = sums(plan, finetuning, hers, key)
        everybody = sums(plan, finetuning, Scans(), key)
        others = sums(plan, finetuning, without_last(Scans()), key)
        shares.append(distance(alone, {n: torch.zeros_like(t) for n, t in alone.items()}))
        assert distance({n: everybody[n] - others[n] for n in alone}, alone) < 1e-6
    assert min(shares) == 0 < max(shares) <= PRIVACY.clip_norm  # with a chance of one half


def test_a_crop_of_a_whole_scan_is_drawn_from_her_own_stream(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetuning, seen = agreed(plan, privacy=dataclasses.replace(PRIVACY, sampling_rate=1.0)), {}

    class Whole(WholeScan):
        def __init__(self, patient: str) -> None:
            self.patient = patient

        def draw(self, least: float, generator: torch.Generator, labels: bool) -> tuple[Tensor, None]:
            seen[self.patient] = float(torch.rand((), generator=generator))
            return torch.ones(2, 4, 6, 4), None

    found = labelled_scans(Scans(), range(10), SEX, "sex", ("F", "M"))
    whole = dataclasses.replace(found, whole=tuple(map(Whole, found.patient)))
    for rows in (range(10), range(4)):
        before, noise = dict(seen), StepSecrets(SecretSource(b"k" * 32), ("line",), 1.0)
        step_sum(network_of(plan, SEX).train(), whole.rows(rows), finetuning, noise, 0, 0.25)
    assert len(set(seen.values())) == 5 and before == seen


# Attack: was she in it? By somebody who knows everybody else, the weights, and her scan and label.


def auc(members: Tensor, others: Tensor) -> float:
    return float(
        (members[:, None] > others).double().mean() + (members[:, None] == others).double().mean() / 2
    )


def test_gradient_alignment_finds_a_member_and_her_label_without_noise_and_stays_under_the_bound_with_it(
    plan: RunPlan,
) -> None:
    privacy = dataclasses.replace(PRIVACY, sampling_rate=1.0, epsilon=1.0)
    local = dataclasses.replace(SEX, steps=1)
    finetuning = agreed(plan, local, rounds=1, privacy=privacy)
    with_her, without = sums(plan, finetuning, Scans()), sums(plan, finetuning, without_last(Scans()))
    other_sex = Scans()
    for row in (8, 9):
        other_sex.covariates[row] = {"sex": "M"}
    hers = {name: with_her[name] - without[name] for name in with_her}  # her cut gradient

    def scores(world: dict[str, Tensor], deviation: float, direction: dict[str, Tensor]) -> Tensor:
        told = []
        for trial in range(150):
            noise = StepSecrets(SecretSource(secrets.token_bytes(32)), (trial,), deviation)
            noised = noise.noised(0, world)
            told.append(sum(float((noised[n] * direction[n]).sum()) for n in direction))
        return torch.tensor(told)

    promise = round_promise(finetuning)
    sigma = promise.deviation / promise.bound
    changed = sums(plan, finetuning, other_sex)
    label = {name: with_her[name] - changed[name] for name in with_her}
    for direction, others, moves in ((hers, without, 1), (label, changed, 2)):
        assert auc(scores(with_her, 0.0, direction), scores(others, 0.0, direction)) == 1.0
        bound = 0.5 * (1 + math.erf(moves / (2 * sigma)))  # a label is replaced: twice the length
        found = auc(
            scores(with_her, promise.deviation, direction), scores(others, promise.deviation, direction)
        )
        assert found <= bound + 4.9 * 0.034 < 1.0  # a false alarm in a million


# Kills, and what was lost


def killed_after(step: int) -> Callable[[int, float], None]:
    def on_step(done: int, loss: float) -> None:
        assert math.isnan(loss)
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("step", [1, 2])
def test_a_round_killed_after_any_step_ends_in_the_bits_of_one_that_was_not(
    plan: RunPlan, tmp_path: Path, step: int
) -> None:
    ask, folder = question(plan, agreed(plan)), tmp_path / "killed"
    with pytest.raises(Killed):
        ROW.once(hospital(folder), ask, plan, on_step=killed_after(step))
    (key,) = folder.rglob("*.secret")
    assert key.stat().st_mode & 0o777 == 0o600
    shutil.copytree(folder, tmp_path / "once more")
    with pytest.raises(Killed):
        ROW.once(hospital(tmp_path / "once more"), ask, plan, on_step=killed_after(3 - step))
    shutil.copytree(folder, tmp_path / "lost")
    next((tmp_path / "lost").rglob("*.secret")).unlink()
    one, two, lost = (
        ROW.once(hospital(own), ask, plan) for own in (folder, tmp_path / "once more", tmp_path / "lost")
    )
    assert torch.equal(one.tensors["head.weight"], two.tensors["head.weight"])
    assert not torch.equal(one.tensors["head.weight"], lost.tensors["head.weight"])
    assert {hospital(own).ledger.spent().num_noised for own in (folder, tmp_path / "lost")} == {1}


def test_other_weights_in_an_answered_place_and_another_answer_are_refused(
    plan: RunPlan, tmp_path: Path
) -> None:
    finetuning = agreed(plan)
    ask = question(plan, finetuning)
    ROW.once(hospital(tmp_path), ask, plan)
    moved = {name: tensor + 1e-3 for name, tensor in ask.shared.items()}
    with pytest.raises(AnsweredBefore, match=r"got another\. Nothing was read"):
        ROW.once(hospital(tmp_path), question(plan, finetuning, shared=moved), plan)
    shutil.rmtree(tmp_path / "answers")
    with pytest.raises(AnsweredBefore, match="this one is another"):
        ROW.once(hospital(tmp_path), ask, plan)


# Bad input, each with its sentence


class Unread(Hospital):
    def scans(self, plan: RunPlan) -> Any:
        raise AssertionError("no scan is read")


def test_a_ceiling_that_the_round_would_pass_refuses_before_a_scan_is_read(
    plan: RunPlan, tmp_path: Path
) -> None:
    with pytest.raises(LedgerRefusal, match=r"'finetuning' at epsilon .*ceiling is 0.5"):
        ROW.once(Unread(tmp_path, None, epsilon_ceiling=0.5), question(plan, agreed(plan)), plan)
    assert Unread(tmp_path, None, epsilon_ceiling=0.5).ledger.verify() == 0


def test_a_layer_that_mixes_scans_refuses_before_a_scan_is_read(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixing(plan: RunPlan, finetuning: FinetunePlan, ask: FinetuneAsk) -> nn.Module:
        network = network_of(plan, finetuning.local)
        network.norm = nn.BatchNorm1d(2)
        return network

    monkeypatch.setattr(exchange, "network_of", mixing)
    with pytest.raises(AskRefused, match="treat samples alone: BatchNorm"):
        ROW.once(Unread(tmp_path, None), question(plan, agreed(plan)), plan)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label_share": 0.5}, "label_share draws among a site's patients by their number"),
        ({"local": dataclasses.replace(SEX, gradient_clip_norm=2.0)}, "gradient_clip_norm has no effect"),
        (
            {"local": LocalFinetuning(task="segmentation", classes=2, network="volume_unet")},
            "set local.network=tokens",
        ),
    ],
)
def test_a_plan_with_privacy_that_contradicts_itself_is_refused(
    plan: RunPlan, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        agreed(plan, **changes)


def test_a_task_whose_loss_mixes_scans_is_refused_in_the_plan(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "mixes", True)
    with pytest.raises(ValueError, match="loss of task=classification mixes scans"):
        agreed(plan)


def test_a_fine_tuning_with_less_noise_than_its_epsilon_asks_for_is_refused(plan: RunPlan) -> None:
    finetuning = agreed(plan)
    assert finetuning.privacy is not None
    less = dataclasses.replace(finetuning.privacy, noise_multiplier=0.9 * finetuning.privacy.noise_multiplier)
    with pytest.raises(ValueError, match="Expected noise at which the steps cost at most epsilon 3"):
        round_promise(dataclasses.replace(finetuning, privacy=less))


def test_sigma_of_a_plan_keeps_all_its_rounds_within_its_epsilon(plan: RunPlan) -> None:
    one, four = agreed(plan, rounds=1), agreed(plan, rounds=4)
    assert round_mechanism(one).steps == round_mechanism(four).steps == 2
    assert round_mechanism(one).noise_multiplier < round_mechanism(four).noise_multiplier
    assert 2.99 < all_rounds(four).upper <= 3.0
    assert FinetunePlan.from_json(four.to_json()) == four
