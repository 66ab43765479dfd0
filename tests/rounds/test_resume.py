import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation.journal import Journal
from meduet_models.weights import load_weights
from server.app import RunObserver, run
from server.checkpoints import OtherPlan
from simulations.engines.in_process import InProcessGrid


class Killed(BaseException):
    """As if the process had ended: nothing catches it."""


def weights(
    miniature: Any, folder: Path, plan: Any, tamper: Any = None, **settings: Any
) -> dict[str, Tensor]:
    client = miniature.client(folder / "sites", tamper=tamper)
    grid = InProcessGrid(client, len(plan.sites))
    return run(grid, plan, folder, model=miniature.model(plan), **settings).shared


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


class Counted:
    """Kills the run at the n-th reply of any kind."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, site: str, kind: str, reply: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Killed
        return reply


# 3 replies to the survey, 3 rounds of 3, 3 to the erasure: 15 places to die
@pytest.mark.parametrize(
    ("at", "optimiser"), [(2, "average"), (4, "average"), (8, "yogi"), (12, "momentum"), (14, "adam")]
)
def test_a_run_killed_anywhere_and_started_again_ends_in_the_same_bits(
    miniature: Any, tmp_path: Path, at: int, optimiser: str
) -> None:
    plan = miniature.plan(optimiser=optimiser)
    undisturbed = weights(miniature, tmp_path / "undisturbed", plan)
    with pytest.raises(Killed):
        weights(miniature, tmp_path / "killed", plan, Counted(at))
    assert same(weights(miniature, tmp_path / "killed", plan), undisturbed)


def test_a_run_killed_between_aggregation_and_checkpoint_repeats_the_round(
    miniature: Any, tmp_path: Path
) -> None:
    class Dies(RunObserver):
        def on_round_end(self, round_number: int, shared: Any, metrics: Any) -> dict[str, Any]:
            if round_number == 2:
                raise Killed
            return {}

    plan = miniature.plan(optimiser="momentum")
    undisturbed = weights(miniature, tmp_path / "undisturbed", plan)
    with pytest.raises(Killed):
        weights(miniature, tmp_path / "killed", plan, observer=Dies())
    assert same(weights(miniature, tmp_path / "killed", plan), undisturbed)


def test_a_damaged_checkpoint_is_said_aloud_and_the_one_before_is_taken(
    miniature: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = miniature.plan()
    undisturbed = weights(miniature, tmp_path / "undisturbed", plan)
    with pytest.raises(Killed):
        weights(miniature, tmp_path / "killed", plan, Counted(12))  # in round 3
    latest = max((tmp_path / "killed" / "checkpoints").glob("round-*"))
    content = bytearray(latest.read_bytes())
    content[-3] ^= 1
    latest.write_bytes(bytes(content))
    assert same(weights(miniature, tmp_path / "killed", plan), undisturbed)
    assert "damaged" in caplog.text
    entries = Journal(tmp_path / "killed" / "journal.jsonl").entries()
    (resumed,) = [entry.record for entry in entries if entry.record["kind"] == "resume"]
    assert resumed["damaged_checkpoints"] == [resumed["round"] + 1]


def test_a_complete_run_asks_nobody_again(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan()
    first = weights(miniature, tmp_path, plan)

    def nobody(site: str, kind: str, reply: Any) -> Any:
        raise AssertionError("a site was asked")

    assert same(weights(miniature, tmp_path, plan, nobody), first)


def test_damaged_final_weights_are_made_again(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan()
    first = weights(miniature, tmp_path, plan)
    model = tmp_path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    assert same(weights(miniature, tmp_path, plan), first)
    assert same(load_weights(model)[0], first)


def test_a_folder_of_another_plan_is_refused(miniature: Any, tmp_path: Path) -> None:
    weights(miniature, tmp_path, miniature.plan(seed=1))
    with pytest.raises(OtherPlan, match="another name"):
        weights(miniature, tmp_path, miniature.plan(seed=2))
    (tmp_path / "plan.json").unlink()
    with pytest.raises(OtherPlan, match="checkpoints of plan"):
        weights(miniature, tmp_path, miniature.plan(seed=2))


def test_a_run_in_the_folder_is_not_overwritten_unless_resumed(miniature: Any, tmp_path: Path) -> None:
    weights(miniature, tmp_path, miniature.plan())
    with pytest.raises(ValueError, match="holds a run"):
        weights(miniature, tmp_path, miniature.plan(), resume=False)


def test_metrics_of_an_interrupted_run_hold_every_round_once(miniature: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        weights(miniature, tmp_path, miniature.plan(), Counted(8))
    weights(miniature, tmp_path, miniature.plan())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2, 3]
    assert metrics["survey"]["patients"] == 33
    assert metrics["erasure"]["rank"] == 1
    assert metrics["rounds"][0]["sites"]["lyon"]["examples"] == 23
    # mean of 1, 1/2, 1/3 with weights 20, 23, 26
    assert metrics["rounds"][0]["loss"]["total"] == pytest.approx((20 + 23 / 2 + 26 / 3) / 69)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 4
    assert Journal(tmp_path / "journal.jsonl").verify() >= 6
