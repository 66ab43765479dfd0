"""A run with a central diffusion model: latents collected, trained on while rounds run, resumed to the same
bits."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

import server.app
from client.app import make_client_app
from client.exchanges.latents import consent
from client.latents.examples import examples_of
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan, StylePlan, TrainingPlan
from federation.plan.release_policy import RAW
from meduet_models.diffusion.artefact import load_generative_model
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.diffusion.training import DiffusionTrainee
from server.app import RunResult
from server.latent_bank.bank import LatentBank
from simulations.engines.in_process import InProcessGrid
from tests.worlds import RECIPIENT, Hospital, KnownScans, bank_key_in


class Killed(BaseException):
    """As if the process had ended."""


@dataclasses.dataclass
class Consenting(Hospital):
    """A hospital with a site.yaml's sentence."""

    sentence: str = ""

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        consent(plan, self.sentence)


def federation(
    plan: RunPlan, folder: Path, on_step: Callable[[], None] = lambda: None, silent: str = ""
) -> InProcessGrid:
    def open_site(context: Context) -> Consenting:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        sentence = "" if name == silent else RAW.consent
        own = folder / "sites" / name
        own.mkdir(parents=True, exist_ok=True)
        return Consenting(own, KnownScans(index), name, sentence=sentence)

    client = make_client_app(open_site, on_step=lambda site, step, loss: on_step())
    return InProcessGrid(client, len(plan.sites), through_wire=True)


def run(grid: InProcessGrid, plan: RunPlan, folder: Path) -> RunResult:
    """A run whose bank has the key that the plan names."""
    return server.app.run(grid, plan, folder, bank_key=bank_key_in(folder.with_name("run.key")))


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    diffusion = DiffusionPlan(
        policy="raw",
        recipient=RECIPIENT,
        transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
        training=DiffusionTraining(batch_size=4),
        begin_round=2,
        steps_per_round=3,
        final_steps=4,
        items_per_round=5,
        items_per_site=8,
    )
    return dataclasses.replace(
        miniature.plan(deadline_s=300.0),
        training=TrainingPlan(rounds=3, steps_per_round=2, batch_size=4, warmup=0.0),
        style=StylePlan(minimum_cohort=4),
        diffusion=diffusion,
    )


def test_a_run_collects_trains_and_leaves_a_model_that_samples(plan: RunPlan, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(federation(plan, tmp_path), plan, folder)
    rounds = result.metrics["rounds"]
    assert "diffusion" not in rounds[0], "begin_round is 2"
    assert [r["diffusion"]["steps"] for r in rounds[1:]] == [3, 3]
    assert [r["diffusion"]["items"] for r in rounds[1:]] == [15, 24]
    assert [part["steps"] for part in result.metrics["diffusion"]] == [3, 3, 4]
    assert result.diffusion == folder / "diffusion.safetensors"
    model = load_generative_model(result.diffusion)
    assert model.patient_data and model.policy == "raw" and model.sites == plan.sites
    conditions = model.conditioner.conditions(examples_of(KnownScans(0), [0, 1], plan), ("content", "style"))
    drawn = sample(model.transformer, conditions, 2, SamplingSettings(steps=2), seed=1)
    assert drawn.shape == (2, 2, 4, 6, 4) and bool(torch.isfinite(drawn).all())
    bank = LatentBank(folder / "diffusion" / "latents", tmp_path / "run.key", create=False)
    assert len(bank) == 24 and bank.layout.content == plan.network.width
    (learned,) = bank.models()
    assert (learned.path, learned.items, learned.withdrawn) == (str(result.diffusion.resolve()), 24, 0)
    gone = bank.forget(site="lyon")
    assert gone.items == 8 and gone.models == (learned.path,)
    assert bank.models()[0].withdrawn == 8


def test_a_run_killed_within_a_round_ends_in_the_same_bits(plan: RunPlan, tmp_path: Path) -> None:
    whole = run(federation(plan, tmp_path / "a"), plan, tmp_path / "a" / "run")
    taken = 0

    def dies() -> None:
        nonlocal taken
        taken += 1
        if taken == 9:  # round 2, the second site's first step: latents are in, training has begun
            raise Killed

    folder = tmp_path / "b"
    with pytest.raises(Killed):
        run(federation(plan, folder, dies), plan, folder / "run")
    resumed = run(federation(plan, folder), plan, folder / "run")
    assert whole.diffusion is not None and resumed.diffusion is not None
    one, other = (load_generative_model(r.diffusion).transformer.state_dict() for r in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = run(federation(plan, folder), plan, folder / "run")
    assert again.diffusion is not None
    third = load_generative_model(again.diffusion).transformer.state_dict()
    assert all(torch.equal(one[name], third[name]) for name in one)


def test_the_centre_trains_while_a_site_does(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The centre's first step waits for a site's, and the site's for the centre's: only together they end."""
    at_site, at_centre = threading.Event(), threading.Event()
    step = DiffusionTrainee.step

    def centre(self: Any, source: Any, number: int) -> Any:
        if number == 0:
            assert at_site.wait(60), "no site took a step while the centre was in its own"
        losses = step(self, source, number)
        at_centre.set()
        return losses

    def site() -> None:
        if any(thread.name == "diffusion" for thread in threading.enumerate()) and not at_site.is_set():
            at_site.set()
            assert at_centre.wait(60), "the centre took no step while the site was in its own"

    monkeypatch.setattr(DiffusionTrainee, "step", centre)
    run(federation(plan, tmp_path, site), plan, tmp_path / "run")
    assert at_site.is_set() and at_centre.is_set()


def test_a_site_without_the_sentence_takes_no_part_and_an_empty_bank_is_said(
    plan: RunPlan, tmp_path: Path
) -> None:
    lenient = dataclasses.replace(plan, aggregation=dataclasses.replace(plan.aggregation, quorum=0.5))
    result = run(federation(lenient, tmp_path, silent="oslo"), lenient, tmp_path / "run")
    assert result.metrics["rounds"][1]["diffusion"]["items"] == 10
    assert result.metrics["rounds"][1]["refused"] == {"oslo": "refused: plan_not_accepted"}
    lines = (tmp_path / "sites" / "oslo" / "journal.jsonl").read_text().splitlines()
    assert not any("sha256" in json.loads(line)["record"] for line in lines), "nothing of it left"


@pytest.mark.parametrize("recipient", ["", "ab" * 32])
def test_a_bank_of_another_key_than_the_plans_asks_nobody(
    plan: RunPlan, tmp_path: Path, recipient: str
) -> None:
    assert plan.diffusion is not None
    other = dataclasses.replace(plan, diffusion=dataclasses.replace(plan.diffusion, recipient=recipient))
    with pytest.raises(ValueError, match=r"bank's key to be the one that the plan names.*Nothing was asked"):
        run(federation(other, tmp_path), other, tmp_path / "run")
    assert not (tmp_path / "sites").exists()
