"""The folder of a run, as the centre writes it: plan, metrics, journal; each file whole or not at all.

`metrics.json` holds everything, `metrics.csv` the same as a table: one row per round and site, and one row
"all" per round with the weighted means and the probes. Both are rewritten after every round.
What this file does not do: weights (`server/checkpoints.py`), pages and figures (`simulations/`).
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation.plan import RunPlan
from server.checkpoints import OtherPlan

_FIRST = ("round", "site", "examples", "seconds")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) atomically: a reader sees the old one or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def claim(folder: Path, plan: RunPlan) -> None:
    """Make the folder this plan's, or raise `OtherPlan` when it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    if path.is_file() and path.read_text(encoding="utf-8") != plan.to_json():
        raise OtherPlan(
            f"Expected {folder} to be empty or of plan {plan.sha256[:12]}; its plan.json is another. "
            "Give the run another name, or remove its folder."
        )
    if not path.is_file():
        write_whole(path, plan.to_json())


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Rewrite `metrics.json` and `metrics.csv`."""
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    rows = [row for round in metrics.get("rounds", ()) for row in _rows(round)]
    columns = [*_FIRST, *sorted({name for row in rows for name in row} - set(_FIRST))]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "metrics.csv", table.getvalue())


def _rows(round: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for site, report in round["sites"].items():
        losses = {f"loss.{term}": value for term, value in report["loss"].items()}
        plain = {name: value for name, value in report.items() if name != "loss"}
        rows.append({"round": round["round"], "site": site, **plain, **losses})
    losses = {f"loss.{term}": value for term, value in round["loss"].items()}
    probes = {
        f"probe.{name}": v for name, v in round.get("probes", {}).items() if isinstance(v, (int, float))
    }
    return [*rows, {"round": round["round"], "site": "all", "seconds": round["seconds"], **losses, **probes}]
