"""A run's numbers where tracking tools look: JSON lines, TensorBoard's event files, MLflow's file store.

The same numbers everywhere, one step per round, under the names of `metrics.csv`; what a run writes again
after it was killed takes the place of what it wrote before. All is in the run's folder `tracking`; nothing
is sent: MLflow's reports to its makers are switched off. Does not do: measure, or read any of it again; the
record of a run is `metrics.json`.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from federation.plan.plan import RunPlan
from server.app import RunObserver
from storage.files import private_folder, write_whole

Tool = Literal["jsonl", "tensorboard", "mlflow"]
FOLDER = "tracking"


class Sink(ABC):
    """One tool's form of the numbers."""

    @abstractmethod
    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write a round's numbers, in the place of what there is of it."""


class JsonLines(Sink):
    """`metrics.jsonl`: an object per round, with `step` and the numbers by name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write a round's numbers, in the place of what there is of it and after it."""
        there = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        kept = [line for line in there if json.loads(line)["step"] < round_number]
        line = json.dumps({"step": round_number, **numbers}, allow_nan=False)
        write_whole(self._path, "\n".join([*kept, line]) + "\n")


class TensorBoard(Sink):
    """Event files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events: Any = None

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write a round's numbers; TensorBoard hides what an earlier process wrote of it and after it."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._events = SummaryWriter(str(self._folder), purge_step=round_number)
        for name, value in numbers.items():
            self._events.add_scalar(name, value, round_number)
        self._events.flush()


class MlflowStore(Sink):
    """MLflow's file store: one run of the experiment that is named as the plan. Needs the extra [mlflow].

    MLflow keeps this form for reading and asks whoever still writes it to say so; the other is a database.
    """

    def __init__(self, folder: Path, plan: RunPlan) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when MLflow is imported
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=folder.resolve().as_uri())
        found = self._client.get_experiment_by_name(plan.name)
        experiment = self._client.create_experiment(plan.name) if found is None else found.experiment_id
        mark = {"plan_sha256": plan.sha256}
        runs = self._client.search_runs([experiment], f"tags.plan_sha256 = '{plan.sha256}'")
        if not runs:
            runs = [self._client.create_run(experiment, tags=mark, run_name=plan.sha256[:12])]
        self._run = runs[0].info.run_id

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write a round's numbers; what is there stays: a round that is run again gives the same."""
        for name, value in numbers.items():
            history = self._client.get_metric_history(self._run, name)
            if round_number not in {metric.step for metric in history}:
                self._client.log_metric(self._run, name, value, step=round_number)


class Tracking(RunObserver):
    """Writes a run's numbers for each of `tools`; told after whoever probes."""

    def __init__(self, plan: RunPlan, folder: Path, tools: tuple[Tool, ...]) -> None:
        own = private_folder(folder / FOLDER) if tools else folder
        made: dict[Tool, Any] = {
            "jsonl": lambda: JsonLines(own / "metrics.jsonl"),
            "tensorboard": lambda: TensorBoard(own / "tensorboard"),
            "mlflow": lambda: MlflowStore(own / "mlflow", plan),
        }
        self._sinks: list[Sink] = [made[tool]() for tool in tools]

    def on_round_end(
        self, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Write the round's seconds, mean losses and probes."""
        numbers = {"seconds": float(metrics["seconds"])}
        for kind, values in (("loss", metrics["loss"]), ("probe", metrics.get("probes", {}))):
            numbers |= {
                f"{kind}.{name}": float(value)
                for name, value in values.items()
                if isinstance(value, int | float)
            }
        for sink in self._sinks:
            sink.write(round_number, numbers)
        return {}
