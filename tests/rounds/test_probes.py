"""Federated probes within whole runs: the real client and network, sums through the gates."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from client.exchanges.probes import probed_patients
from client.training.site_state import StateFolder
from federation.exchanges.probes import content_part, joint_bound, joint_width, style_part
from federation.journal import Journal
from federation.plan.plan import ProbePlan, RunPlan, TrainingPlan
from meduet_models.erasure import ErasureMoments, patient_means
from meduet_models.meduet import MeDUET
from meduet_models.probes.ridge import ridge_from_sums
from meduet_models.probes.sums import coordinates, explained_from_sums, linear_probe_from_sums, read_site
from meduet_models.published.pretrained import load_pretrained
from server.app import RunResult, run
from server.checkpoints import Checkpoints
from server.model import MeduetModel
from simulations.engines.in_process import InProcessGrid
from tests.worlds import Hospital, Latents


class Aged(Latents):
    """Patients of one site whose age is in their anatomy."""

    def __init__(self, site: int, count: int) -> None:
        super().__init__([site], count)
        self.covariates = [
            {"age": 50 + 20 * float(x[0, :2].mean() - x[0, 2:].mean()) / (1 + site)} for x in self.values
        ]


def a_plan(miniature: Any, **probes: Any) -> RunPlan:
    plan: RunPlan = miniature.plan(deadline_s=300.0)
    training = TrainingPlan(rounds=2, steps_per_round=2, batch_size=4, warmup=0.0)
    probe_plan = ProbePlan(**{"every_rounds": 1, "folds": 3, "anatomy": {"age": (0.0, 100.0)}, **probes})
    return dataclasses.replace(plan, training=training, probes=probe_plan)


def go(plan: RunPlan, folder: Path, sizes: Sequence[int] = (18, 18, 18)) -> RunResult:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        return Hospital(folder / "sites" / name, Aged(index, sizes[index]), name)

    grid = InProcessGrid(make_client_app(open_site), len(plan.sites), through_wire=True)
    return run(grid, plan, folder)


@pytest.fixture(scope="module")
def probed(miniature: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPlan, Path, RunResult]:
    folder, plan = tmp_path_factory.mktemp("probed"), a_plan(miniature)
    return plan, folder, go(plan, folder)


def test_every_reading_is_in_the_metrics_of_its_round_and_of_the_end(probed: Any) -> None:
    plan, folder, result = probed
    metrics = json.loads((folder / "metrics.json").read_text())
    entries = [entry["federated_probes"] for entry in metrics["rounds"]] + [metrics["federated_probes"]]
    assert len(entries) == 3
    from_content = [entry["readings"].pop("site_from_content", None) for entry in entries]
    assert all(0 <= read <= 1 for read in from_content[:2])
    assert from_content[2] is None  # erased on these very patients: a reading below chance, no evidence
    for entry in entries:
        assert entry["refused"] == {} and entry["sites"] == dict.fromkeys(plan.sites, 18)
        assert set(entry["readings"]) == {
            "site_from_style",
            "chance_site",
            "content_through_style",
            "anatomy_from_content",
            "anatomy_from_content_age",
            "anatomy_from_style",
            "anatomy_from_style_age",
            "patient_from_content_within_site",
            "patient_from_style_within_site",
            "chance_patient_within_site",
            "style_gap_closed",
        }
        readings = entry["readings"]
        assert readings["chance_site"] == pytest.approx(1 / 3)
        assert readings["chance_patient_within_site"] == pytest.approx(1 / 18)
        assert readings["site_from_style"] > 0.7  # scales of 1, 2 and 3; 21 hits of 54 happen by guessing
        assert readings["patient_from_content_within_site"] > readings["patient_from_style_within_site"]
    assert result.metrics["federated_probes"] == metrics["federated_probes"]


def test_the_readings_are_those_of_everybodys_factors_in_one_place(probed: Any) -> None:
    """The federation's readings after the last round, against features pooled behind its back."""
    plan, folder, result = probed
    last = Checkpoints(folder / "checkpoints", plan.sha256).latest()
    assert last is not None
    unerased = MeduetModel(plan).with_code(last.shared, last.bank)
    joint, sites, folds = [], [], []
    for index, name in enumerate(plan.sites):
        state = StateFolder(folder / "sites" / name / "state", plan.sha256).before(3)
        model = MeDUET(plan.network, 3).eval()
        model.load_state_dict({**state.home, **unerased})
        scans = Aged(index, 18)
        with torch.no_grad():
            own = torch.cat([model.content_code(scans.values), model.pooled_style(scans.values)], 1)
        own = patient_means(own.double(), scans.patients)
        joint.append(own * (joint_bound(plan) / own.norm(dim=1, keepdim=True).clamp(min=joint_bound(plan))))
        sites += [index] * 18
        folds += list(probed_patients(scans, plan, 0, b"1" * 32).folds.values())
    x, site, fold = torch.cat(joint), torch.tensor(sites), torch.tensor(folds)

    def moments(rows: torch.Tensor) -> ErasureMoments:
        return ErasureMoments.of(x[rows], [str(i) for i in range(int(rows.sum()))], joint_bound(plan))

    readings = result.metrics["rounds"][-1]["federated_probes"]["readings"]
    through = explained_from_sums(
        [moments(fold == f) for f in range(3)], style_part(plan), content_part(plan), together=True
    )
    assert readings["content_through_style"] == pytest.approx(float(through), abs=1e-6)
    for factor, part in (("content", content_part(plan)), ("style", style_part(plan))):
        said = torch.empty(len(x), dtype=torch.long)
        for f in range(3):
            own = {str(s): moments((fold != f) & (site == s)) for s in range(3)}
            cut = {s: coordinates(sums, part) for s, sums in own.items()}
            said[fold == f] = read_site(x[fold == f][:, part], *linear_probe_from_sums(cut))
        recall = [float((said[site == s] == s).double().mean()) for s in range(3)]
        assert readings[f"site_from_{factor}"] == pytest.approx(sum(recall) / 3, abs=1e-9)
    assert x.shape == (54, joint_width(plan))


def test_the_readers_in_the_final_model_are_the_ridge_of_everybodys_codes(probed: Any) -> None:
    plan, folder, result = probed
    pretrained = load_pretrained(folder / "model.safetensors")
    ages, codes, folds = [], [], []
    for index, name in enumerate(plan.sites):
        state = StateFolder(folder / "sites" / name / "state", plan.sha256).before(3)
        model = MeDUET(plan.network, 3).eval()
        model.load_state_dict({**state.home, **result.shared})
        scans = Aged(index, 18)
        with torch.no_grad():
            codes.append(model.content_code(scans.values).double())
        ages += [float(one["age"]) for one in scans.covariates]
        folds += list(probed_patients(scans, plan, 0, b"1" * 32).folds.values())
    x, age, fold = torch.cat(codes), torch.tensor(ages, dtype=torch.float64), torch.tensor(folds)
    assert float(x.norm(dim=1).max()) < joint_bound(plan)
    joint = torch.cat([x, (age[:, None] / 50 - 1)], dim=1)
    sums = [
        ErasureMoments.of(joint[fold == f], [str(i) for i in range(int((fold == f).sum()))], 1e6)
        for f in range(3)
    ]
    size = plan.network.code_size
    fitted = ridge_from_sums(sums, slice(0, size), slice(size, None))
    expected = 50 * (fitted(x)[:, 0] + 1)
    torch.testing.assert_close(pretrained.readers["age"](x), expected, rtol=1e-4, atol=1e-3)


def test_probes_change_no_weight(miniature: Any, probed: Any, tmp_path: Path) -> None:
    _, _, result = probed
    silent = go(a_plan(miniature, every_rounds=0, folds=5, anatomy={}), tmp_path)
    assert "federated_probes" not in silent.metrics
    assert all(torch.equal(silent.shared[name], tensor) for name, tensor in result.shared.items())


def test_a_site_below_the_cohort_is_listed_and_stops_nothing(miniature: Any, tmp_path: Path) -> None:
    plan = a_plan(miniature, every_rounds=2)
    metrics = go(plan, tmp_path, sizes=(18, 12, 18)).metrics  # 12 patients are 4 in a fold; the plan wants 5
    assert "federated_probes" not in metrics["rounds"][0]
    report = metrics["rounds"][1]["federated_probes"]
    assert report["refused"] == {plan.sites[1]: "refused: cohort_too_small"}
    assert set(report["sites"]) == {plan.sites[0], plan.sites[2]}
    assert report["readings"]["chance_site"] == 0.5
    journal = Journal(tmp_path / "sites" / plan.sites[1] / "journal.jsonl")
    lines = (tmp_path / "sites" / plan.sites[1] / "journal.jsonl").read_text().splitlines()
    assert journal.verify() == len(lines)
    assert {json.loads(line)["record"]["kind"] for line in lines} == {"survey", "round", "erasure", "refusal"}


def test_where_too_few_can_answer_there_is_no_reading(miniature: Any, tmp_path: Path) -> None:
    metrics = go(a_plan(miniature, every_rounds=2), tmp_path, sizes=(12, 12, 18)).metrics
    assert metrics["federated_probes"]["readings"] == {}
    assert len(metrics["federated_probes"]["refused"]) == 2


def test_a_finished_run_that_is_opened_again_asks_nobody(probed: Any) -> None:
    plan, folder, result = probed
    before = (folder / "sites" / plan.sites[0] / "journal.jsonl").read_bytes()
    assert go(plan, folder).metrics["federated_probes"] == result.metrics["federated_probes"]
    assert (folder / "sites" / plan.sites[0] / "journal.jsonl").read_bytes() == before
