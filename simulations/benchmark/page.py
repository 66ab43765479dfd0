"""The benchmark's page and files, made from the cells' results: benchmark.html, .md, .csv, .json, figures.

Can be made again at any time from what is on disk. It trains nothing and measures nothing.
"""

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simulations.benchmark.aims import OURS, POOLED, RIVALS, Aim, aims_of
from simulations.benchmark.figures import draw_downstream, draw_factors, draw_gaps
from simulations.benchmark.settings import BenchmarkSettings
from simulations.benchmark.tables import (
    Summaries,
    Table,
    csv_text,
    numbers_of,
    summarise,
    tables_of,
)
from storage.files import write_whole

_TEMPLATES = Path(__file__).resolve().parents[1]
_TEMPLATE = "benchmark/page.html"
_VERDICTS = {True: "met", False: "missed", None: "unknown"}
_TEXTS = {
    "phantoms": "Simulated patients and scanners: four hospitals, one held out; probes on further patients "
    "that every scanner saw, so that the truth about a swap is known.",
    "hippocampus": "Real scans of one hospital, divided into four by appearance after windowing, one held "
    "out. One hospital's scans divided are a simulation of several hospitals.",
    "hippocampus_scanners": "Real scans of one hospital, dealt at random to four, one held out, with a "
    "simulated scanner on top at each.",
}


def write_benchmark(settings: BenchmarkSettings, results: Sequence[Mapping[str, Any]]) -> Path:
    """Write every file of the benchmark into its folder; the page's path."""
    folder = Path(settings.folder)
    numbers = numbers_of(results)
    summaries = summarise(numbers)
    titles = {method: settings.table[method].title for method in settings.methods}
    failed = {_name(r): r["error"] for r in results if "error" in r}
    errors = {(r["data"], r["method"]): r["error"] for r in results if "error" in r}
    tables = {data: tables_of(data, titles, summaries, errors) for data in settings.data}
    aims = aims_of(settings.data, summaries)
    record = {
        "settings": asdict(settings),
        "aims": [asdict(aim) for aim in aims],
        "summaries": [dict(zip(_WHERE, where, strict=True)) | asdict(s) for where, s in summaries.items()],
        "failed": failed,
        "numbers": [asdict(number) for number in numbers],
    }
    write_whole(folder / "benchmark.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_whole(folder / "benchmark.csv", csv_text(numbers))
    write_whole(folder / "benchmark.md", _markdown(settings, aims, tables, failed))
    write_whole(folder / "benchmark.html", _page(settings, aims, tables, failed, titles, summaries))
    return folder / "benchmark.html"


_WHERE = ("data", "method", "measure")


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['data']} {result['method']}, seed {result['seed']}"


def interval_text(settings: BenchmarkSettings) -> str:
    """What the brackets in the tables mean."""
    if len(settings.seeds) > 1:
        return f"Mean and 95% t-interval over {len(settings.seeds)} seeds."
    return (
        "One seed: intervals are over patients (bootstrap downstream, Wilson for probes), 95%; they say "
        "nothing of another seed."
    )


def _markdown(
    settings: BenchmarkSettings,
    aims: Sequence[Aim],
    tables: Mapping[str, Sequence[Table]],
    failed: Mapping[str, str],
) -> str:
    verdicts = Table(
        "Aims", ("data", "aim", "found", "verdict"), tuple((a.data, a.text, a.found, a.verdict) for a in aims)
    )
    parts = [f"# Benchmark\n\n{interval_text(settings)} Measured on: {settings.patients} patients.\n"]
    parts += [verdicts.markdown(), *(table.markdown() for own in tables.values() for table in own)]
    if failed:
        parts.append(Table("Failed", ("cell", "error"), tuple(failed.items())).markdown())
    return "\n".join(parts)


def _page(
    settings: BenchmarkSettings,
    aims: Sequence[Aim],
    tables: Mapping[str, Sequence[Table]],
    failed: Mapping[str, str],
    titles: Mapping[str, str],
    summaries: Summaries,
) -> str:
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    num_cells = len(settings.data) * len(settings.methods) * len(settings.seeds)
    known = [aim for aim in aims if aim.met is not None]
    tiles = [
        (f"{sum(bool(aim.met) for aim in known)} of {len(known)}", "aims met, of those measured"),
        (str(len(settings.methods)), "methods"),
        (str(len(settings.data)), "data sets"),
        (str(len(settings.seeds)), "seeds"),
        (f"{num_cells - len(failed)} of {num_cells}", "cells done"),
    ]
    page: str = environment.get_template(_TEMPLATE).render(
        summary=f"Every method on every data set, size {settings.size}, measured on {settings.patients} "
        "patients. What was chosen on what is in docs/benchmark.md.",
        tiles=[{"value": value, "label": label} for value, label in tiles],
        interval_text=interval_text(settings),
        aims=[asdict(aim) | {"verdict": aim.verdict, "style": _VERDICTS[aim.met]} for aim in aims],
        failed=list(failed.items()),
        parts=[
            {
                "data": data,
                "text": _TEXTS.get(data, ""),
                "figures": _figures(settings, data, titles, summaries),
                "tables": own,
            }
            for data, own in tables.items()
        ],
        command=" ".join(["meduet-simulate", *sys.argv[1:]]),
        settings_text=json.dumps(asdict(settings), indent=2),
    )
    return page


def _figures(
    settings: BenchmarkSettings, data: str, titles: Mapping[str, str], summaries: Summaries
) -> list[str]:
    """Figures of a data set, each as a data address."""
    folder = Path(settings.folder) / "figures"
    drawn = [
        draw_factors(data, titles, summaries, folder / f"{data}-factors.png"),
        draw_gaps(data, titles, summaries, folder / f"{data}-gaps.png"),
        draw_downstream(
            data, titles, summaries, (OURS, POOLED, *RIVALS, "random"), folder / f"{data}-downstream.png"
        ),
    ]
    return ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in drawn if path]
