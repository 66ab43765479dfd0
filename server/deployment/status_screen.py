"""What `meduet-server status` shows: the run's present, its sites, and the processes of the centre.

Does not do: ask anybody; it reads `status.json`, `metrics.json` and `processes.json`, and works when
everything is down.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from federation.programs.processes import read_state
from federation.terminal import cell, visible
from server.deployment.status import read_status
from server.run_folder import is_held

OVER = ("complete", "refused")
_STATES = {"erasure": "site erasure"}  # states that are called otherwise on the screen
_EVERY_S = 1.0
_SHOWN = 5  # last rounds, and last replies that were put aside


def gather(folder: Path, state_dir: Path | None = None) -> dict[str, Any]:
    """The run in `folder`, and the processes supervised in `state_dir`, as one JSON value.

    Raises `ValueError` when there is no run.
    """
    status = read_status(folder)
    if status is None:
        raise ValueError(f"Expected a run in {folder}; there is no status.json. Was it submitted yet?")
    status["running"] = is_held(folder)
    if status["state"] not in (*OVER, "failed") and not status["running"]:
        status["state"] = "interrupted"
    processes = None if state_dir is None else read_state(state_dir)
    return {"run": status, "rounds": _rounds(folder), "centre": processes}


def show(console: Console, folder: Path, state_dir: Path | None = None, live: bool = True) -> None:
    """Print the status, or keep it on the screen until the run is over. Raises `ValueError` without a run."""
    if not live or not console.is_terminal:
        console.print(picture(gather(folder, state_dir)))
        return
    with (
        suppress(KeyboardInterrupt),  # Ctrl-C ends the looking, not the run
        Live(picture(gather(folder, state_dir)), console=console, auto_refresh=False) as screen,
    ):
        while (summary := gather(folder, state_dir))["run"]["state"] not in OVER:
            screen.update(picture(summary), refresh=True)
            time.sleep(_EVERY_S)
        screen.update(picture(summary), refresh=True)


def as_json(folder: Path, state_dir: Path | None = None) -> str:
    """The same for programs."""
    return json.dumps(gather(folder, state_dir), indent=1)


def picture(summary: Mapping[str, Any]) -> RenderableType:
    """`gather`'s value as tables."""
    run = summary["run"]
    state = _STATES.get(run["state"], run["state"])
    head = f"{run['name']}  plan {run['plan'][:12]}  {state}  round {run['round']} of {run['rounds']}"
    when = f"{state} for {_span(run['since'])}, submitted {_ago(run['started'])}"
    when += f", resumed {run['resumed']} times" if run["resumed"] else ""
    parts: list[RenderableType] = [Text(visible(head), style="bold"), Text(when, style="dim")]
    if run["reason"]:
        parts.append(Text(visible(run["reason"]), style="red"))
    sites = Table("site", "state", "round", "last reply", "examples", "seconds", "loss", "up", "down")
    for name, site in run["sites"].items():
        sites.add_row(
            cell(name),
            site["state"],
            str(site["round"] or ""),
            _ago(site["last_seen"]),
            str(site.get("examples", "")),
            f"{site['seconds']:.1f}" if "seconds" in site else "",
            f"{site['loss']['total']:.3f}" if "total" in site.get("loss", {}) else "",
            _size(site["bytes_up"]),
            _size(site["bytes_down"]),
        )
    parts.append(sites)
    if summary["rounds"]:
        parts += _rounds_shown(summary["rounds"][-_SHOWN:], len(run["sites"]))
    if run["quarantined"]:
        aside = Table("round", "site", "why its reply did not count", title="Put aside", title_justify="left")
        for one in run["quarantined"][-_SHOWN:]:
            aside.add_row(str(one["round"]), cell(one["site"]), cell(one["why"]))
        parts.append(aside)
    if summary["centre"] is not None:
        centre = Table("process", "state", "pid", "restarts", title="This centre", title_justify="left")
        for name, one in summary["centre"]["processes"].items():
            centre.add_row(cell(name), one["state"], str(one["pid"] or ""), str(one["restarts"]))
        parts.append(centre)
    return Group(*parts)


def _rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds that are on disk for good: who answered, who was put aside, how long, the mean losses."""
    path = folder / "metrics.json"
    if not path.is_file():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))["rounds"]
    names = ("round", "seconds", "refused", "loss")
    return [{**{name: one[name] for name in names}, "answered": list(one["sites"])} for one in kept]


def _rounds_shown(rounds: Sequence[Mapping[str, Any]], num_sites: int) -> list[RenderableType]:
    """The last rounds as a table, and the mean losses of the last one, term by term."""
    table = Table("round", "seconds", "answered", "put aside", "loss", title="Rounds", title_justify="left")
    for one in rounds:
        table.add_row(
            str(one["round"]),
            f"{one['seconds']:.1f}",
            f"{len(one['answered'])} of {num_sites}",
            Text(", ".join(one["refused"])),
            f"{one['loss']['total']:.3f}" if "total" in one["loss"] else "",
        )
    terms = "  ".join(f"{name} {value:.3g}" for name, value in sorted(rounds[-1]["loss"].items()))
    return [table, Text(f"losses of round {rounds[-1]['round']}: {terms}", style="dim")]


def _ago(when: str | None) -> str:
    return "never" if when is None else f"{_span(when)} ago"


def _span(when: str) -> str:
    """How long ago that was."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
