"""Federated fine-tuning with privacy through messages: what it learns beside chance and beside none of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from federation.plan.finetuning_privacy import FinetunePrivacy, with_noise
from federation.plan.plan import RunPlan
from meduet_models.meduet import FactorNetwork
from server.exchanges.finetuning import FinetunedRun, pretrained_sha256, run_finetuning
from simulations.engines.in_process import InProcessGrid
from tests.worlds import Hospital, KnownScans, unanswered_places

PATIENTS, HELD_OUT = 200, 100
PRIVACY = FinetunePrivacy(epsilon=3.0, clip_norm=0.5, sampling_rate=0.1, expected_patients=100)


class Killed(BaseException):
    """As if the process had ended."""


class Planted(KnownScans):
    """The second channel leans to the right in men, to the left in women, in noise of about that size."""

    def __init__(self, site: int, inverted: bool = False) -> None:
        super().__init__(site, PATIENTS, held_out=HELD_OUT)
        man = torch.arange(PATIENTS) % 2
        ramp = torch.linspace(-1, 1, 4).reshape(-1, 1, 1) * (1 + site)
        self.values[:, 1] += (2 * man - 1).reshape(-1, 1, 1, 1) * ramp
        self.man = man
        self.covariates = [{"sex": "FM"[int(one) ^ inverted]} for one in man]

    def labels(self, indices: Any, view: int = 0) -> None:
        """None."""


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    return miniature.plan(deadline_s=60.0)


@pytest.fixture
def pretrained(plan: RunPlan) -> FactorNetwork:
    return FactorNetwork(plan.network, seed=5)


def agreed(plan: RunPlan, pretrained: FactorNetwork, privacy: FinetunePrivacy | None) -> FinetunePlan:
    local = LocalFinetuning(
        task="classification", classes=2, encoder="frozen", steps=10, batch_size=16, learning_rate=0.05
    )
    return with_noise(
        FinetunePlan(
            run_sha256=plan.sha256,
            pretrained_sha256=pretrained_sha256(pretrained),
            local=local,
            rounds=2,
            target="sex",
            target_values=("F", "M"),
            privacy=privacy,
        )
    )


def grid_of(
    plan: RunPlan,
    folder: Path,
    inverted: bool = False,
    on_step: Callable[[str, int, float], None] = lambda site, step, loss: None,
) -> InProcessGrid:
    def open_site(context: Context) -> Any:
        index = int(context.node_config["partition-id"])
        own = folder / "sites" / plan.sites[index]
        own.mkdir(parents=True, exist_ok=True)
        return Hospital(own, Planted(index, inverted), plan.sites[index])

    return InProcessGrid(make_client_app(open_site, on_step), len(plan.sites), through_wire=True)


def accuracy(plan: RunPlan, done: FinetunedRun) -> float:
    right = []
    for site in range(len(plan.sites)):
        scans = Planted(site)
        held = scans.indices("test")
        right.append(done.network(scans.latents(held)).argmax(1) == scans.man[held])
    return float(torch.cat(right).float().mean())


def test_with_privacy_a_class_is_learned_nearly_as_well_and_it_is_the_labels_that_teach_it(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    reached = {}
    for name, privacy in (("none", None), ("private", PRIVACY), ("inverted", PRIVACY)):
        folder, finetuning = tmp_path / name, agreed(plan, pretrained, privacy)
        grid = grid_of(plan, folder, inverted=name == "inverted")
        done = run_finetuning(grid, plan, finetuning, pretrained, folder / "fine")
        reached[name] = accuracy(plan, done)
        assert all(not report["refused"] for report in done.rounds)
        if privacy is not None:
            assert {site["examples"] for site in done.rounds[-1]["sites"].values()} == {100}
            assert not any(site.get("loss") for site in done.rounds[-1]["sites"].values())
        for site in plan.sites:
            assert unanswered_places(folder / "sites" / site / "ledger.jsonl") == []
    assert reached["none"] > 0.9 and reached["private"] > 0.8
    assert reached["inverted"] < 0.2  # noise that happens to lie well would serve one of both alone


def test_stopped_anywhere_and_resumed_keeps_every_site_to_one_charge_and_no_site_is_asked_what_it_answered(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    finetuning, calls = agreed(plan, pretrained, PRIVACY), 0

    def kill(site: str, step: int, loss: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 45:  # in round 2, at the second site
            raise Killed

    with pytest.raises(Killed):
        run_finetuning(grid_of(plan, tmp_path, on_step=kill), plan, finetuning, pretrained, tmp_path / "f")
    resumed = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "f")
    again = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "f")
    for name, tensor in resumed.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    for index, site in enumerate(plan.sites):
        spent = Hospital(tmp_path / "sites" / site, Planted(index), site).ledger.spent()
        assert spent.num_noised == 2 and 2.9 < spent.total.upper <= 3.0


def test_steps_that_noise_drowns_are_not_asked_for(
    plan: RunPlan, pretrained: FactorNetwork, tmp_path: Path
) -> None:
    few = FinetunePrivacy(epsilon=0.5, clip_norm=0.5, sampling_rate=0.1, expected_patients=4)
    finetuning = agreed(plan, pretrained, few)
    with pytest.raises(ValueError, match=r"signal to noise of a step of 0\.1 or more; it is at most 0\.0"):
        run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "f")
    assert not (tmp_path / "sites").exists()
