"""The same numbers for every tool, read with its own library; a run that went on has each round once."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from server.config import compose_config
from simulations.run import run
from simulations.tracking import Tracking
from tests.small_simulation import small_simulation
from tests.worlds import small_plan

Numbers = dict[str, dict[int, float]]


def of_json_lines(folder: Path) -> Numbers:
    found: Numbers = {}
    for line in (folder / "tracking" / "metrics.jsonl").read_text().splitlines():
        read = json.loads(line)
        step = read.pop("step")
        for name, value in read.items():
            assert step not in found.setdefault(name, {})
            found[name][step] = value
    return found


def of_tensorboard(folder: Path) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / "tensorboard"))
    events.Reload()
    found: Numbers = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        assert len({one.step for one in scalars}) == len(scalars)
        found[name] = {one.step: one.value for one in scalars}
    return found


def of_mlflow(folder: Path, plan: Any) -> Numbers:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    client = mlflow.MlflowClient(tracking_uri=(folder / "tracking" / "mlflow").resolve().as_uri())
    (made,) = client.search_runs([client.get_experiment_by_name(plan.name).experiment_id])
    assert made.data.tags["plan_sha256"] == plan.sha256
    found: Numbers = {}
    for name in made.data.metrics:
        history = client.get_metric_history(made.info.run_id, name)
        assert len({one.step for one in history}) == len(history)
        found[name] = {one.step: one.value for one in history}
    return found


def assert_same(ours: Numbers, theirs: Numbers, digits: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.keys() == theirs[name].keys(), name
        assert all(math.isclose(v, theirs[name][s], rel_tol=digits) for s, v in values.items()), name


def test_a_simulation_tells_every_tool_the_numbers_of_its_record(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    settings = [*small_simulation(rounds=2), "tracking=[jsonl,tensorboard,mlflow]", f"folder={tmp_path}"]
    run(compose_config(settings))
    rounds = json.loads((tmp_path / "metrics.json").read_text())["rounds"]
    found = of_json_lines(tmp_path)
    assert found["loss.total"] == {entry["round"]: entry["loss"]["total"] for entry in rounds}
    assert found["seconds"] == {entry["round"]: entry["seconds"] for entry in rounds}
    probes = rounds[-1]["probes"]
    assert {name for name in found if name.startswith("probe.")} == {f"probe.{name}" for name in probes}
    assert found["probe.site_from_content"][2] == probes["site_from_content"]
    from federation.plan.plan import RunPlan

    assert_same(found, of_mlflow(tmp_path, RunPlan.from_json((tmp_path / "plan.json").read_text())))
    assert_same(found, of_tensorboard(tmp_path), 2**-23)  # float32


@pytest.mark.parametrize("tool", ["jsonl", "tensorboard", "mlflow"])
def test_rounds_that_are_run_again_stand_there_once(tool: Any, tmp_path: Path) -> None:
    if tool == "mlflow":
        pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    plan = small_plan()
    for rounds in ((1, 2, 3), (3, 4)):  # killed after round 3 was told, before it was on disk
        tracking = Tracking(plan, tmp_path, (tool,))
        for number in rounds:
            report = {"seconds": 1.5, "loss": {"total": 1 / number}, "probes": {"site": 0.5, "who": "x"}}
            tracking.on_round_end(number, {}, report)
    read = {"jsonl": of_json_lines, "tensorboard": of_tensorboard, "mlflow": lambda f: of_mlflow(f, plan)}
    expected = {
        "seconds": dict.fromkeys(range(1, 5), 1.5),
        "loss.total": {number: 1 / number for number in range(1, 5)},
        "probe.site": dict.fromkeys(range(1, 5), 0.5),
    }
    assert_same(expected, read[tool](tmp_path), 2**-23)


def test_without_a_tool_nothing_is_written(tmp_path: Path) -> None:
    Tracking(small_plan(), tmp_path, ()).on_round_end(1, {}, {"seconds": 1.0, "loss": {}})
    assert not list(tmp_path.iterdir())
