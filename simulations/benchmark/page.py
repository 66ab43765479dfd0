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

from meduet_models.downstream.tasks import metric_of
from simulations.benchmark.aims import OURS, POOLED, RIVALS, Aim, aims_of
from simulations.benchmark.figures import draw_downstream, draw_factors, draw_gaps
from simulations.benchmark.paired import paired
from simulations.benchmark.settings import BenchmarkSettings
from simulations.benchmark.tables import (
    MODE_WORDS,
    RANDOM,
    YARDSTICK_ROWS,
    Summaries,
    Table,
    csv_text,
    downstream_measure,
    measured_of,
    numbers_of,
    summarise,
    tables_of,
    who,
)
from simulations.downstream.comparisons import YARDSTICKS, Comparison, sentences, withdrawn
from simulations.downstream.settings import PRETRAINED
from simulations.findings import findings_of
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
    "ixi": "Whole heads of one hospital with age and sex, dealt at random to four, one held out, with a "
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
    comparisons = {data: paired(data, results, titles) for data in settings.data}
    tables = {
        data: [
            *tables_of(data, titles, summaries, errors, comparisons[data]),
            *_against(data, comparisons[data], titles.get(OURS, "")),
            *_fairness(data, results, titles),
        ]
        for data in settings.data
    }
    findings = {data: _findings(data, titles, summaries, comparisons[data]) for data in settings.data}
    aims = aims_of(settings.data, summaries, _withdrawn(comparisons, titles.get(OURS, "")))
    record = {
        "settings": asdict(settings),
        "findings": findings,
        "aims": [asdict(aim) for aim in aims],
        "comparisons": {data: [asdict(one) for one in own] for data, own in comparisons.items()},
        "summaries": [dict(zip(_WHERE, where, strict=True)) | asdict(s) for where, s in summaries.items()],
        "failed": failed,
        "numbers": [asdict(number) for number in numbers],
    }
    write_whole(folder / "benchmark.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_whole(folder / "benchmark.csv", csv_text(numbers))
    write_whole(folder / "benchmark.md", _markdown(settings, aims, tables, failed, findings))
    write_whole(folder / "benchmark.html", _page(settings, aims, tables, failed, titles, summaries, findings))
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


def _findings(
    data: str, titles: Mapping[str, str], summaries: Summaries, comparisons: Sequence[Comparison]
) -> list[str]:
    """What is read first of a data set: what takes back numbers of a method, and who is not above what."""
    told = [
        f"{title}: {text}"
        for method, title in titles.items()
        if method != RANDOM
        for text in findings_of(measured_of(data, method, summaries))
    ]
    return told + sentences(comparisons, with_numbers=False)


def _withdrawn(comparisons: Mapping[str, Sequence[Comparison]], title: str) -> set[tuple[str, str]]:
    """Data sets and measures of ours whose comparisons say nothing."""
    modes = {who(title, mode): mode for mode in PRETRAINED}
    names = {metric_of(name).title: name for name in ("dice", "auc", "r2")}
    return {
        (data, downstream_measure(task, names[metric], test, modes[whose], labels))
        for data, own in comparisons.items()
        for task, metric, test, labels, whose in withdrawn(own)
        if whose in modes
    }


def _against(data: str, comparisons: Sequence[Comparison], title: str) -> list[Table]:
    """Every comparison of ours, with its interval."""
    rows = tuple(
        (one.who, one.task, one.metric, one.test.replace("_", " "), one.labels, YARDSTICKS[one.rival],
         str(one), "above" if one.above else "not above")
        for one in comparisons
        if title and one.who.startswith(f"{title}, ")
    )  # fmt: skip
    header = ("method", "task", "metric", "patients", "labels", "yardstick", "difference", "verdict")
    return [Table(f"{data}: {title} against the yardsticks, paired", header, rows)] if rows else []


def _fairness(data: str, results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[Table]:
    """FairnessScore by method, of the first seed that told one."""
    rows, known = [], set[tuple[str, ...]]()
    for result in results:
        for one in result.get("fairness", ()) if result["data"] == data else ():
            key = (result["method"], one["mode"], one["metric"], one["test"], one["grouping"])
            if key in known or result["method"] not in titles:
                continue
            known.add(key)
            own = "; ".join(f"{g}: {v:.3f} ({one['patients'][g]})" for g, v in one["groups"].items())
            mode = MODE_WORDS.get(one["mode"], YARDSTICK_ROWS.get(one["mode"], one["mode"]))
            title = titles[result["method"]] if one["mode"] in MODE_WORDS else ""
            rows.append((title, mode, metric_of(one["metric"]).title, one["test"].replace("_", " "),
                         one["grouping"], f"{one['score']:.3f}", own))  # fmt: skip
    header = (
        "method",
        "read",
        "metric",
        "patients",
        "groups by",
        "FairnessScore",
        "in each group (patients)",
    )
    return [Table(f"{data}: FairnessScore, all labels", header, tuple(rows))] if rows else []


def _markdown(
    settings: BenchmarkSettings,
    aims: Sequence[Aim],
    tables: Mapping[str, Sequence[Table]],
    failed: Mapping[str, str],
    findings: Mapping[str, Sequence[str]],
) -> str:
    verdicts = Table(
        "Aims", ("data", "aim", "found", "verdict"), tuple((a.data, a.text, a.found, a.verdict) for a in aims)
    )
    parts = [f"# Benchmark\n\n{interval_text(settings)} Measured on: {settings.patients} patients.\n"]
    if any(findings.values()):
        told = [f"- {data}: {text}" for data, own in findings.items() for text in own]
        parts.append("\n".join(["## Read this first", "", *told, ""]))
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
    findings: Mapping[str, Sequence[str]],
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
        findings=[(data, text) for data, own in findings.items() for text in own],
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
