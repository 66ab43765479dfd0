"""Federated fine-tuning through messages: the real client, the real network, labels in memory."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from client.latents.labelled import labelled_scans
from client.secrets.site_secret import seed_of
from client.training.finetuning import finetune
from federation.exchanges.finetuning import FinetuneAsk, FinetunePlan, LocalFinetuning
from federation.plan.plan import RunPlan
from federation.wire.messages import MessageError
from meduet_models.downstream.starting import start_sha256
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from meduet_models.weights import load_weights
from scans.volume_plan import VolumePlan
from server.checkpoints import OtherPlan
from server.exchanges.finetuning import FinetunedRun, pretrained_sha256, run_finetuning
from simulations.engines.in_process import InProcessGrid
from strategies.quorum import RoundFailed
from tests.worlds import Hospital, KnownScans, unanswered_places

LOCAL = LocalFinetuning(task="segmentation", classes=2, steps=3, batch_size=4)


class Killed(BaseException):
    """As if the process had ended."""


class Scans(KnownScans):
    """Ten labelled patients of a site, eight for training; of known sex and age."""

    def __init__(self, site: int, highest: int = 1) -> None:
        super().__init__(site, 10, held_out=2, labelled=10)
        self.label *= highest
        self.covariates = [{"sex": "FM"[n % 2], "age": 30.0 + 3 * n} for n in range(10)]

    def volumes(self, indices: Sequence[int], plan: VolumePlan, view: int = 0) -> torch.Tensor:
        blurred = torch.nn.functional.interpolate(self.latents(indices)[:, :1], size=plan.shape)
        return blurred.sigmoid().half()


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    return miniature.plan(deadline_s=60.0)


@pytest.fixture
def pretrained(plan: RunPlan) -> FactorNetwork:
    return FactorNetwork(plan.network, seed=5)


def agreed(plan: RunPlan, pretrained: FactorNetwork, **changes: Any) -> FinetunePlan:
    values = {"run_sha256": plan.sha256, "pretrained_sha256": pretrained_sha256(pretrained), "local": LOCAL}
    return FinetunePlan(**{**values, "rounds": 3, **changes})


def grid_of(
    plan: RunPlan,
    folder: Path,
    scans: Callable[[int], Scans] = Scans,
    on_step: Callable[[str, int, float], None] = lambda site, step, loss: None,
) -> InProcessGrid:
    def open_site(context: Context) -> Any:
        index = int(context.node_config["partition-id"])
        own = folder / "sites" / plan.sites[index]
        own.mkdir(parents=True, exist_ok=True)
        return Hospital(own, scans(index), plan.sites[index])

    return InProcessGrid(make_client_app(open_site, on_step), len(plan.sites), through_wire=True)


@pytest.mark.parametrize("encoder", ["frozen", "finetuned"])
def test_rounds_train_what_the_plan_says_and_every_release_is_in_the_books(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path, encoder: Any
) -> None:
    finetuning = agreed(plan, pretrained, local=dataclasses.replace(LOCAL, encoder=encoder))
    done = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    assert [report["round"] for report in done.rounds] == [1, 2, 3]
    assert all(set(report["sites"]) == set(plan.sites) and not report["refused"] for report in done.rounds)
    start = task_of("segmentation").network(pretrained, 2, trainable=True, seed=0).state_dict()
    changed = {n for n, t in done.network.state_dict().items() if not torch.equal(t, start[n])}
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith("encoder.") for name in changed) is (encoder == "finetuned")
    for site in plan.sites:
        assert unanswered_places(tmp_path / "sites" / site / "ledger.jsonl") == []
        lines = (tmp_path / "sites" / site / "journal.jsonl").read_text().splitlines()
        records = [json.loads(line)["record"] for line in lines]
        assert [(r["kind"], r["round"], r["plan"]) for r in records] == [
            ("finetuning", round_number, finetuning.sha256) for round_number in (1, 2, 3)
        ]
        assert all(r["norm_after"] <= r["bound"] == 8 * finetuning.update_clip_norm for r in records)
    tensors, provenance = load_weights(done.path)
    assert FinetunePlan.from_json(provenance["finetuning"]) == finetuning
    assert set(tensors) == set(done.network.state_dict())


def test_one_site_in_a_federation_is_the_loop_alone(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan(sites=("oslo",), deadline_s=60.0)
    pretrained = FactorNetwork(plan.network, seed=5)
    finetuning = agreed(plan, pretrained, rounds=1, update_clip_norm=1e4)
    done = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    alone = task_of("segmentation").network(pretrained, 2, trainable=True, seed=0)
    start = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    scans = Scans(0)
    finetune(
        alone,
        labelled_scans(scans, scans.indices("train"), LOCAL),
        LOCAL,
        seed=seed_of(b"1" * 32, "finetuning", 0),
    )
    # the sum of updates is kept in steps of 2^-q, so the last bits of a weight are the grid's, not the loop's
    bound = 2.0**-20
    for name, tensor in done.network.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=0, atol=bound)
    assert any(float((t - start[n]).abs().max()) > 100 * bound for n, t in alone.state_dict().items())


def test_stopped_anywhere_and_resumed_is_never_stopped(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    finetuning = agreed(plan, pretrained)
    whole = run_finetuning(grid_of(plan, tmp_path / "a"), plan, finetuning, pretrained, tmp_path / "a" / "f")
    calls = 0

    def kill(site: str, step: int, loss: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 14:  # in round 2, at the second site
            raise Killed

    folder = tmp_path / "b"
    with pytest.raises(Killed):
        run_finetuning(grid_of(plan, folder, on_step=kill), plan, finetuning, pretrained, folder / "f")
    resumed = run_finetuning(grid_of(plan, folder), plan, finetuning, pretrained, folder / "f")
    again = run_finetuning(grid_of(plan, folder), plan, finetuning, pretrained, folder / "f")
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name])
        assert torch.equal(tensor, again.network.state_dict()[name])
    assert len(resumed.rounds) == 3


def test_classes_of_scans_are_learned_through_the_same_walls(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    local = LocalFinetuning(task="classification", classes=2, steps=2, encoder="frozen")
    finetuning = agreed(plan, pretrained, local=local, rounds=1, target="sex", target_values=("F", "M"))
    done = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    assert done.rounds[0]["sites"]["oslo"]["examples"] == 8


def test_a_number_is_learned_through_the_same_walls(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    local = LocalFinetuning(task="regression", classes=1, steps=8)
    finetuning = agreed(plan, pretrained, local=local, rounds=3, target="age", target_values=("20", "90"))
    done = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    losses = [entry["loss"]["total"] for entry in done.rounds]
    assert losses[-1] < losses[0]
    assert done.network(Scans(0).values).shape == (10, 1)


def broken(kind: str) -> Callable[[int], Any]:
    def scans(index: int) -> Any:
        made = Scans(index, highest=2 if kind == "class" and index == 1 else 1)
        if kind == "labels" and index == 1:
            made.has_label = [False] * 10
        if kind == "few" and index == 1:
            made.has_label = [True, True, True] + [False] * 7
        return made

    return scans


@pytest.mark.parametrize(
    ("kind", "word"),
    [("labels", "no_labels"), ("class", "plan_not_accepted"), ("few", "cohort_too_small")],
)
def test_a_site_that_cannot_answer_says_one_word_and_the_quorum_decides(
    miniature: Any, tmp_path: Path, kind: str, word: str
) -> None:
    def run(quorum: float) -> FinetunedRun:
        plan = miniature.plan(quorum=quorum, deadline_s=60.0)
        pretrained = FactorNetwork(plan.network, seed=5)
        folder = tmp_path / str(quorum)
        grid = grid_of(plan, folder, broken(kind))
        return run_finetuning(grid, plan, agreed(plan, pretrained, rounds=1), pretrained, folder / "f")

    with pytest.raises(RoundFailed, match=word):
        run(1.0)
    assert run(0.6).rounds[0]["refused"] == {"lyon": f"refused: {word}"}


def test_other_pretrained_weights_are_refused_on_both_sides(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FactorNetwork(plan.network, seed=6)
    finetuning = agreed(plan, other)
    with pytest.raises(ValueError, match="Expected the pretrained encoder"):
        run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    monkeypatch.setattr(
        "server.exchanges.finetuning.start_sha256", lambda network: finetuning.pretrained_sha256
    )
    with pytest.raises(RoundFailed, match="not_answered"):
        run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    log = (tmp_path / "sites" / "oslo" / "site.log").read_text()
    assert "Expected the pretrained encoder" in log


@pytest.mark.parametrize("network", ["volume_unet", "joined"])
def test_a_u_net_on_the_volume_is_trained_in_rounds_from_the_start_that_the_plan_names(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path, network: Any
) -> None:
    local = dataclasses.replace(LOCAL, network=network, augmentation=1.0, average=0.9, steps=2)
    start = pretrained_sha256(pretrained, network)
    finetuning = agreed(plan, pretrained, local=local, pretrained_sha256=start, rounds=2)
    done = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    assert [sorted(report["sites"]) for report in done.rounds] == [sorted(plan.sites)] * 2
    tensors = done.network.state_dict()
    assert start_sha256(done.network) != start
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    again = run_finetuning(grid_of(plan, tmp_path / "2"), plan, finetuning, pretrained, tmp_path / "2" / "f")
    assert all(torch.equal(tensors[n], t) for n, t in again.network.state_dict().items())


def test_a_u_net_from_another_start_is_refused_on_both_sides(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = dataclasses.replace(LOCAL, network="volume_unet")
    other = pretrained_sha256(pretrained, "volume_unet", seed=1)
    finetuning = agreed(plan, pretrained, local=local, pretrained_sha256=other)
    with pytest.raises(ValueError, match="Expected the pretrained encoder"):
        run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    monkeypatch.setattr("server.exchanges.finetuning.start_sha256", lambda network: other)
    with pytest.raises(RoundFailed, match="not_answered"):
        run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "fine")
    assert "Expected the pretrained encoder" in (tmp_path / "sites" / "oslo" / "site.log").read_text()


def test_a_start_from_anatomy_is_refused_where_nothing_starts_from_it(
    plan: RunPlan, pretrained: FactorNetwork
) -> None:
    with pytest.raises(ValueError, match="anatomy_start=canonical has no effect"):
        agreed(plan, pretrained, anatomy_start="canonical")


def test_a_folder_of_another_fine_tuning_is_not_gone_on_with(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    first = agreed(plan, pretrained, rounds=1)
    run_finetuning(grid_of(plan, tmp_path), plan, first, pretrained, tmp_path / "fine")
    with pytest.raises(OtherPlan):
        second = agreed(plan, pretrained, rounds=2)
        run_finetuning(grid_of(plan, tmp_path), plan, second, pretrained, tmp_path / "fine")


def test_a_question_of_another_run_or_in_other_words_is_malformed(
    plan: RunPlan, pretrained: FactorNetwork
) -> None:
    def ask(text: str) -> FinetuneAsk:
        return FinetuneAsk(plan_json=plan.to_json(), finetuning_json=text, round=1, shared={}, fixed={})

    finetuning = agreed(plan, pretrained)
    assert FinetuneAsk.from_record(ask(finetuning.to_json()).to_record()).finetuning(plan) == finetuning
    with pytest.raises(MessageError, match="canonical"):
        ask(finetuning.to_json().replace(":", ": ")).finetuning(plan)
    with pytest.raises(MessageError, match="one of"):
        ask(dataclasses.replace(finetuning, run_sha256="0" * 64).to_json()).finetuning(plan)
    with pytest.raises(MessageError, match="no setting"):
        ask(finetuning.to_json().replace('"rounds"', '"rouns"')).finetuning(plan)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rounds": 0}, "rounds"),
        ({"label_share": 0.0}, "label_share"),
        ({"target": "sex"}, "no effect"),
        ({"local": LocalFinetuning(task="classification", classes=2)}, "target covariate"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    plan: RunPlan, pretrained: FactorNetwork, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        agreed(plan, pretrained, **changes)
