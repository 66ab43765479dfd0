"""`meduet-simulate --config-name benchmark`: every method on every data set, one table, one page.

A cell is one method on one data set with one seed, computed in a process of its own (`benchmark_cell.py`).
The same command again does what is not done yet: a cell whose settings and version are unchanged is kept, an
interrupted one goes on after its last checkpoint, a failed one is tried again. A cell that fails is listed
with its error and stops no other.

    data/<data>-<seed>-<hash>/     hospitals and their encodings, made once and read by all cells
    runs/<data>-<method>-<seed>-<hash>/   runs, as meduet-simulate leaves them
    results/*.json  logs/*.log     what each cell told
    benchmark.json  .csv  .md  .html  figures/
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from federation.terminal import say
from server.config import plain
from simulations.benchmark.jobs import Job, run_jobs
from simulations.benchmark.page import write_benchmark
from simulations.benchmark.settings import BenchmarkSettings, Cell, DataSet, benchmark_settings, cells_of
from storage.files import private_folder, write_whole

_MODULE = "simulations.benchmark.cell"


class CellsFailed(RuntimeError):
    """Cells failed; the page is written and lists them."""


def run_benchmark(config: DictConfig, console: Console | None = None) -> Path:
    """Everything that is not done yet, and the page; returns the page's path.

    Raises `ValueError` for wrong settings, before anything is made, and `CellsFailed` when all is done but
    some cells failed.
    """
    settings = benchmark_settings(plain(config))
    GlobalHydra.instance().clear()  # the cells' settings are composed from here on
    sets, cells = cells_of(settings)
    folder = Path(settings.folder)
    for name in ("data", "runs", "results", "logs", "jobs"):
        private_folder(folder / name)
    todo = [cell for cell in cells if not _done(cell)]
    needed = [made for made in sets if any(cell.made == made.folder for cell in todo)]
    _compute(settings, needed, todo, len(cells) - len(todo), console or Console(stderr=True, highlight=False))
    results = [json.loads(Path(cell.result).read_text(encoding="utf-8")) for cell in cells]
    page = write_benchmark(settings, results)
    if failed := sum("error" in result for result in results):
        raise CellsFailed(f"{failed} of {len(cells)} cells failed; {page} lists them.")
    return page


def _done(cell: Cell) -> bool:
    """Whether the cell's result is there, of these settings, and not an error."""
    try:
        result: Mapping[str, Any] = json.loads(Path(cell.result).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return result.get("key") == cell.key and "error" not in result


def _compute(
    settings: BenchmarkSettings, sets: Sequence[DataSet], cells: Sequence[Cell], done: int, console: Console
) -> None:
    """Run the cells, the data sets before them; every cell leaves a result or an error."""
    by_label = {cell.label: cell for cell in cells}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        task = bars.add_task("cells", total=done + len(cells), completed=done)
        running: list[str] = []

        def show() -> None:
            bars.update(task, description="cells: " + ("; ".join(running) or "none running"))

        def on_start(job: Job) -> None:
            running.append(job.label)
            show()

        def on_end(job: Job, error: str | None) -> None:
            running.remove(job.label)
            cell = by_label.get(job.label)
            if error is not None:
                say(bars.console, f"{job.label} failed: {error}")
                if cell is not None:
                    _write_error(cell, error)
            if cell is not None:
                bars.advance(task)
            show()

        run_jobs(_jobs(settings, sets, cells), settings.workers, on_start, on_end)


def _jobs(settings: BenchmarkSettings, sets: Sequence[DataSet], cells: Sequence[Cell]) -> list[Job]:
    """Data sets, then cells; cells of the same run one after another, as two would write its folder."""
    jobs, last_of_run = [], dict[str, str]()
    for made in sets:
        jobs.append(_job(settings, "data", made.label, json.dumps(dataclasses.asdict(made))))
    labels = {made.folder: made.label for made in sets}
    for cell in cells:
        run = cell.config["folder"]
        after = [labels[cell.made], *([last_of_run[run]] if run in last_of_run else [])]
        jobs.append(_job(settings, "cell", cell.label, cell.to_json(), *after))
        last_of_run[run] = cell.label
    return jobs


def _job(settings: BenchmarkSettings, kind: str, label: str, text: str, *after: str) -> Job:
    folder = Path(settings.folder)
    name = label.replace(",", "").replace(" ", "-")
    file = folder / "jobs" / f"{kind}-{name}.json"
    write_whole(file, text)
    log = folder / "logs" / f"{kind}-{name}.log"
    return Job(label=label, module=_MODULE, arguments=(kind, str(file)), log=log, after=after)


def _write_error(cell: Cell, error: str) -> None:
    record = {"key": cell.key, "data": cell.data, "method": cell.method, "seed": cell.seed, "error": error}
    write_whole(Path(cell.result), json.dumps(record, indent=1) + "\n")
