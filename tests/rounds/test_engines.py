import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.journal import Journal
from federation.reply_book import ReplyBook
from federation.wire.wire import array_record, tensors_of
from meduet_models.weights import load_weights
from server.app import run
from server.exchanges.pretraining import pretraining
from simulations.engines.in_process import FixedThreads, InProcessGrid
from strategies.content_share import ContentShare
from strategies.quorum import Roster


def in_process(miniature: Any, folder: Path, plan: Any, **grid: Any) -> Any:
    client = miniature.client(folder / "sites", plan.participants)
    engine = InProcessGrid(client, len(plan.participants), **grid)
    return run(engine, plan, folder, model=miniature.model(plan))


def test_messages_carried_as_bytes_give_the_same_weights_and_metrics(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan()
    direct = in_process(miniature, tmp_path / "direct", plan)
    wired = in_process(miniature, tmp_path / "wired", plan, through_wire=True)
    assert all(torch.equal(direct.shared[name], wired.shared[name]) for name in direct.shared)
    assert direct.metrics["rounds"][2]["sites"] == wired.metrics["rounds"][2]["sites"]
    assert wired.metrics["rounds"][0]["sites"]["oslo"]["bytes_up"] > 0


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum"])
def test_robust_rules_run_whole_rounds_and_leave_no_files(miniature: Any, tmp_path: Path, rule: str) -> None:
    plan = miniature.plan(rule=rule)
    assert in_process(miniature, tmp_path, plan).shared["weight"].isfinite().all()
    assert not list(tmp_path.glob("replies-*"))


def test_sites_alone_send_nothing_and_leave_no_shared_model(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan(method="alone")
    result = in_process(miniature, tmp_path, plan)
    assert result.shared == {} and result.model is None
    assert not (tmp_path / "model.safetensors").exists()
    assert [len(entry["sites"]) for entry in result.metrics["rounds"]] == [3, 3, 3]
    assert result.metrics["rounds"][0]["sites"]["oslo"]["bytes_up"] == 0


def test_all_data_pooled_is_one_participant(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan(method="pooled")
    result = in_process(miniature, tmp_path, plan)
    assert set(result.metrics["rounds"][0]["sites"]) == {"pooled"}
    assert result.model is not None


def test_flowers_own_loop_can_drive_the_strategy(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan(rounds=2)
    ours = in_process(miniature, tmp_path / "ours", plan)
    model = miniature.model(plan)
    shared, home = model.start()
    shared["constant"] = torch.tensor([1.5, -0.25]) * 6 / 33  # what the survey makes of it
    bank = {"entries": torch.tensor([[1.5, -0.25]]) * 6}
    book = ReplyBook(Journal(tmp_path / "flower" / "journal.jsonl"))
    strategy = ContentShare(
        plan,
        shared,
        pretraining(plan, bank, home),
        roster=Roster(plan.sites),
        folder=tmp_path / "flower",
        book=book,
    )
    grid = InProcessGrid(miniature.client(tmp_path / "flower"), 3)
    result = strategy.start(grid, array_record(shared), num_rounds=2)
    assert torch.equal(tensors_of(result.arrays)["weight"], ours.shared["weight"])


ON_RAY = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("miniature", sys.argv[1])
miniature = importlib.util.module_from_spec(spec)
sys.modules["miniature"] = miniature
spec.loader.exec_module(miniature)

from server.app import run
from simulations.engines.ray_engine import run_on_ray

folder = Path(sys.argv[2])
plan = miniature.a_plan(rounds=2, deadline_s=240.0)
run_on_ray(
    lambda grid: run(grid, plan, folder, model=miniature.TinyModel(plan)),
    miniature.tiny_client(folder / "sites"),
    3,
)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_the_ray_engine_ends_in_the_same_bits_as_the_process_engine(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan(rounds=2, deadline_s=240.0)
    client = FixedThreads(miniature.client(tmp_path / "process" / "sites"), 1)
    process = run(InProcessGrid(client, 3), plan, tmp_path / "process", model=miniature.model(plan))
    # in a process of its own: Ray leaves children behind that pytest would complain of
    script = tmp_path / "on_ray.py"
    script.write_text(ON_RAY)
    folder = tmp_path / "ray"
    conftest = Path(__file__).with_name("conftest.py")
    root = str(conftest.parents[2])
    path = os.pathsep.join([root, str(conftest.parent)])
    done = subprocess.run(
        [sys.executable, str(script), str(conftest), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights, provenance = load_weights(folder / "model.safetensors")
    assert provenance["plan_sha256"] == plan.sha256
    assert all(torch.equal(process.shared[name], weights[name]) for name in process.shared)
