"""The folder of a run, as the centre writes it: plan, metrics, journal; each file whole or not at all.

`metrics.json` holds everything, `metrics.csv` the same as a table: one row per round and site, and one row
"all" per round with the weighted means and the probes. Both are rewritten after every round.
What this file does not do: weights (`server/checkpoints.py`), pages and figures (`simulations/`).
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from federation.exchanges.finetuning import FinetunePlan
from federation.plan.plan import RunPlan
from server.checkpoints import OtherPlan
from storage.files import private_folder, write_whole
from storage.locks import is_locked, locks

LOCK_NAME = "run.lock"
_LOOK_S = 2.0
"""Looking whether the lock is held takes it for a moment; on a busy machine, for a long one."""
_AGREED: dict[type[RunPlan] | type[FinetunePlan], str] = {
    RunPlan: "plan.json",
    FinetunePlan: "finetuning.json",
}
"""What a folder is of: a run's plan, or a fine-tuning."""
_FIRST = ("round", "site", "examples", "seconds")


class FolderBusy(RuntimeError):
    """Another process writes this run."""


def claim(folder: Path, agreed: RunPlan | FinetunePlan) -> None:
    """Make the folder this plan's or fine-tuning's, or raise `OtherPlan` when it is another's."""
    private_folder(folder)
    for kind, name in _AGREED.items():
        path, ours = folder / name, isinstance(agreed, kind)
        if path.is_file() and (not ours or path.read_text(encoding="utf-8") != agreed.to_json()):
            raise OtherPlan(
                f"Expected {folder} to be empty or of plan {agreed.sha256[:12]}; its {name} is another. "
                "Give the run another name, or remove its folder."
            )
        if ours and not path.is_file():
            write_whole(path, agreed.to_json())


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder for this process: the lock goes when the process does, however it ends.

    Raises `FolderBusy` when another process holds it for longer than somebody who only looks.
    """
    private_folder(folder)
    with (folder / LOCK_NAME).open("a", encoding="utf-8") as lock:
        end = time.monotonic() + _LOOK_S
        while not locks(lock):
            if time.monotonic() > end:
                raise FolderBusy(
                    f"Expected nobody to write {folder}; another process does. It goes on; this one stops."
                )
            time.sleep(_LOOK_S / 20)
        yield


def is_held(folder: Path) -> bool:
    """Whether a process writes this run now."""
    return is_locked(folder / LOCK_NAME)


def is_complete(folder: Path, plan_sha256: str) -> bool:
    """Whether the folder holds the end of a run of this plan, or of this fine-tuning.

    Raises `OtherPlan` when it holds another's.
    """
    found = [
        kind.from_json((folder / name).read_text(encoding="utf-8")).sha256
        for kind, name in _AGREED.items()
        if (folder / name).is_file()
    ]
    if not found:
        return False
    if found != [plan_sha256]:
        raise OtherPlan(
            f"Expected {folder} to be empty or of plan {plan_sha256[:12]}; it is of {found[0][:12]}. Give "
            "the run another folder."
        )
    metrics = folder / "metrics.json"
    return metrics.is_file() and "final" in json.loads(metrics.read_text(encoding="utf-8"))


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Rewrite `metrics.json` and `metrics.csv`."""
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    rows = [row for entry in metrics.get("rounds", ()) for row in _rows(entry)]
    columns = [*_FIRST, *sorted({name for row in rows for name in row} - set(_FIRST))]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "metrics.csv", table.getvalue())


def _rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for site, report in entry["sites"].items():
        losses = {f"loss.{term}": value for term, value in report["loss"].items()}
        plain = {name: value for name, value in report.items() if name != "loss"}
        rows.append({"round": entry["round"], "site": site, **plain, **losses})
    losses = {f"loss.{term}": value for term, value in entry["loss"].items()}
    probes = {
        f"probe.{name}": v for name, v in entry.get("probes", {}).items() if isinstance(v, (int, float))
    }
    return [*rows, {"round": entry["round"], "site": "all", "seconds": entry["seconds"], **losses, **probes}]
