"""Whole runs of the policies with noise: sites answer once, the bank is labelled, the centre trains on it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

import server.app
from client.app import make_client_app
from federation.exchanges.private_rounds import run_epsilon
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import load_generative_model
from meduet_models.weights import save_weights
from server.app import RunObserver, RunResult
from server.exchanges.synthetic_latents import check_samples
from server.latent_bank.bank import LatentBank
from server.latent_bank.listing import items, summary
from server.public_scans import PUBLIC_SCANS
from simulations.engines.in_process import InProcessGrid
from strategies.aggregation import ReplyRefused
from tests.rounds.noised import PUBLIC, SYNTHETIC, the_plan
from tests.worlds import (
    Hospital,
    KnownScans,
    bank_key_in,
)

POLICIES = ("synthetic", "aggregate")


class Killed(BaseException):
    """As if the process had ended."""


def federation(plan: RunPlan, folder: Path, on_step: Any = lambda site, step, loss: None) -> InProcessGrid:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        return Hospital(folder / "sites" / name, KnownScans(index, 40), name, epsilon_ceiling=8.0)

    return InProcessGrid(make_client_app(open_site, on_step=on_step), len(plan.sites), through_wire=True)


def run(plan: RunPlan, folder: Path, observer: RunObserver | None = None, **shown: Any) -> RunResult:
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / PUBLIC_SCANS, {"latents": PUBLIC}, {})
    key = bank_key_in(folder / "bank.key")
    grid = federation(plan, folder, **shown)
    return server.app.run(grid, plan, folder, observer=observer, bank_key=key)


@pytest.fixture(scope="module", params=POLICIES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    plan = the_plan(request.param)
    return plan, folder, run(plan, folder)


def books(plan: RunPlan, folder: Path) -> dict[str, Hospital]:
    return {s: Hospital(folder / "sites" / s, None, s, epsilon_ceiling=8.0) for s in plan.sites}


def test_each_site_answers_once_and_style_code_and_latents_cost_the_plans_epsilon(done: Any) -> None:
    plan, folder, _ = done
    kind = {"synthetic": "synthetic_latents", "aggregate": "latent_moments"}[plan.latent_policy.name]
    for hospital in books(plan, folder).values():
        lines = [entry.record for entry in hospital.journal.entries()]
        assert [line["kind"] for line in lines] == ["style_code", kind]
        assert lines[1]["counts"] == {} and lines[1]["metrics"] == {} and "items" not in lines[1]
        place = {"synthetic": "generation", "aggregate": "release"}[plan.latent_policy.name]
        assert lines[1]["noise"].startswith(f"noise enters {place}: Gaussian, deviation")
        spent = hospital.ledger.spent()
        assert (spent.num_noised, spent.num_plain) == (2, 0)
        assert 7.9 < spent.total.upper == run_epsilon(plan).upper <= 8.0
        assert list(hospital.state_dir.rglob("*.secret")) == []


def test_the_bank_is_labelled_with_policy_site_and_epsilon_and_no_patient_data(done: Any) -> None:
    plan, folder, result = done
    bank = LatentBank(folder / "diffusion" / "latents", folder / "bank.key", create=False)
    number = plan.diffusion.noised.samples
    assert len(bank) == 3 * number and not bank.patient_data
    for item in items(bank):
        assert item["policy"] == plan.latent_policy.name and item["site"] in plan.sites
        assert 7.9 < item["epsilon"] <= 8.0 and item["delta"] == 1e-5
    told = summary(bank)["sites"]["oslo"]
    assert told["kept"] == number and told["policies"] == [plan.latent_policy.name]
    (learned,) = bank.models()
    assert learned.items == 3 * number
    model = load_generative_model(result.diffusion)
    assert model.policy == plan.latent_policy.name and not model.patient_data
    report = json.loads(model.provenance["reports"])[0]
    assert report["policy"] == plan.latent_policy.name
    assert report["items"] == dict.fromkeys(plan.sites, number) and 7.9 < report["epsilon"][1] <= 8.0
    assert ("signal_to_noise" in report) == (plan.latent_policy.name == "synthetic")


def test_a_site_that_withdraws_is_taken_out_of_the_bank(done: Any, tmp_path: Path) -> None:
    _, folder, _ = done
    shutil.copytree(folder / "diffusion", tmp_path / "diffusion")
    bank = LatentBank(tmp_path / "diffusion" / "latents", folder / "bank.key", create=False)
    gone = bank.forget(site="lyon")
    assert gone.items > 0 and len(gone.models) == 1 and "lyon" not in {i["site"] for i in items(bank)}


def test_a_run_that_is_gone_on_with_asks_nobody_again_and_ends_in_the_same_bits(done: Any) -> None:
    plan, folder, result = done
    before = load_generative_model(result.diffusion).transformer.state_dict()
    again = run(plan, folder)
    after = load_generative_model(again.diffusion).transformer.state_dict()  # type: ignore[arg-type]
    assert all(torch.equal(before[name], after[name]) for name in before)
    for hospital in books(plan, folder).values():
        assert len(hospital.journal.entries()) == 2


def test_a_site_killed_in_its_steps_and_a_centre_that_lost_its_bank_end_in_the_same_bits(
    tmp_path: Path,
) -> None:
    plan, taken = the_plan("synthetic"), 0

    def dies(site: str, step: int, loss: float) -> None:
        nonlocal taken
        taken += 1
        if taken == 2:
            raise Killed

    with pytest.raises(Killed):
        run(plan, tmp_path / "a", on_step=dies)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    results = [run(plan, tmp_path / name) for name in ("a", "b")]
    samples = [answers_of(plan, tmp_path / name) for name in ("a", "b")]
    assert torch.equal(samples[0]["oslo"], samples[1]["oslo"])  # its key was there when it was killed
    assert not torch.equal(samples[0]["lyon"], samples[1]["lyon"])  # it had not begun
    shutil.rmtree(tmp_path / "a" / "diffusion")
    (tmp_path / "a" / "diffusion.safetensors").unlink()
    again = run(plan, tmp_path / "a")
    one, other = (load_generative_model(r.diffusion).transformer.state_dict() for r in (results[0], again))  # type: ignore[arg-type]
    assert all(torch.equal(one[name], other[name]) for name in one)
    for hospital in books(plan, tmp_path / "a").values():
        lines = [e.record for e in hospital.journal.entries() if e.record["kind"] == "synthetic_latents"]
        assert len(lines) == 2 and len({line["sha256"] for line in lines}) == 1
        assert hospital.ledger.spent().num_noised == 2


def answers_of(plan: RunPlan, folder: Path) -> dict[str, torch.Tensor]:
    from meduet_models.weights import load_weights

    path = f"answers/{plan.sha256[:12]}/synthetic_latents-0002.safetensors"
    return {site: load_weights(folder / "sites" / site / path)[0]["latents"] for site in plan.sites}


def test_models_at_home_that_noise_drowns_are_refused_before_a_site_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchanges.synthetic_latents.DROWNED", 50.0)
    synthetic = dataclasses.replace(SYNTHETIC, although_noise_wins=False, expected_patients=500)
    plan = the_plan("synthetic", synthetic=synthetic)
    with pytest.raises(ValueError, match=r"step at home: at most .*expected 50 or more.*diffusion=aggregate"):
        run(plan, tmp_path)
    for hospital in books(plan, tmp_path).values():
        assert [entry.record["kind"] for entry in hospital.journal.entries()] == ["style_code"]


def test_a_bank_of_another_key_asks_nobody(tmp_path: Path) -> None:
    plan = the_plan("synthetic", recipient="1" * 64)
    with pytest.raises(ValueError, match="bank's key to be the one that the plan names"):
        run(plan, tmp_path)


@pytest.mark.parametrize("wrong", ["fewer", "longer", "nan", "names", "another's", "known spacing"])
def test_an_answer_that_is_not_the_plans_samples_is_put_aside(done: Any, wrong: str) -> None:
    from federation.exchanges.latents import ToldLatents
    from federation.exchanges.synthetic_latents import synthetic_examples, synthetic_items

    plan = the_plan("synthetic")
    latents = torch.ones(6 - (wrong == "fewer"), 2, 4, 6, 4)
    latents[0] *= {"longer": 1e6, "nan": torch.nan}.get(wrong, 1.0)
    examples = synthetic_examples(plan, "lyon" if wrong == "another's" else "oslo", latents)
    if wrong == "known spacing":
        examples = dataclasses.replace(examples, spacing=torch.ones(len(latents), 3))
    told = ToldLatents(
        plan_sha256=plan.sha256, site="oslo", round=2, first=0, total=len(latents),
        items=synthetic_items(plan, "lyon" if wrong == "names" else "oslo", len(latents)), examples=examples,
    )  # fmt: skip
    with pytest.raises(ReplyRefused, match=r"^Expected "):
        check_samples(told, plan)
