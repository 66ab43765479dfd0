"""The table of a downstream evaluation as files: downstream.json, downstream.csv, a figure, a page.

Reads rows and writes them; trains and measures nothing. What has no value is null in JSON and empty in CSV.
"""

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from meduet_models.downstream.tasks import metric_of
from simulations.downstream.comparisons import YARDSTICKS, Comparison, compare, measured, sentences
from simulations.downstream.evaluate import DownstreamRow
from simulations.downstream.fairness import Fairness
from simulations.downstream.settings import PRETRAINED
from simulations.report.figures import INK, SITE_COLOURS, save, style_axes
from storage.files import private_folder, write_whole

_TEMPLATES = Path(__file__).resolve().parents[1]
_TEMPLATE = "downstream/report.html"
_MODES = {
    "frozen": "pretrained, frozen",
    "frozen_tokens": "pretrained, frozen, all tokens",
    "finetuned": "pretrained, fine-tuned",
    "scratch": "same network from scratch",
    "unet": "small U-Net over latents",
    "label_map": "mean training label (reads no scan)",
    "ridge": "ridge on raw latents, own token",
    "ridge_neighbours": "ridge on raw latents, 27 tokens",
    "random": "random encoder, frozen",
    "unet_volume": "plain U-Net on the volume",
    "volume_unet": "our U-Net on the volume",
    "volume_start": "our U-Net on the volume, from public anatomy",
    "joined": "our U-Net on the volume with content tokens",
    "federated": "pretrained, fine-tuned in the federation",
}
_COLUMNS = [
    field.name for field in fields(DownstreamRow) if not field.name.startswith(("resamples", "first_"))
]
_TESTS = {"seen": "seen hospitals", "unlabelled": "hospitals without labels", "held_out": "held-out hospital"}


def write_downstream(
    folder: Path,
    rows: Sequence[DownstreamRow],
    facts: Mapping[str, Any],
    fairness: Sequence[Fairness] = (),
) -> Path:
    """Write the table below `folder`; `facts` (JSON values) say what was run. Returns the page's path."""
    private_folder(folder)
    plain = [
        {
            k: None if isinstance(v, float) and math.isnan(v) else v
            for k, v in asdict(row).items()
            if k in _COLUMNS
        }
        for row in rows
    ]
    compared = comparisons_of(rows)
    tables = {
        "rows": plain,
        "comparisons": [asdict(one) | {"above": one.above} for one in compared],
        "fairness": [asdict(one) for one in fairness],
    }
    content = json.dumps(_finite({**facts, **tables}), indent=1, allow_nan=False)
    write_whole(folder / "downstream.json", content + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    write_whole(folder / "downstream.csv", table.getvalue())
    figure = draw_downstream(rows, folder / "downstream.png")
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(_TEMPLATE).render(
        figure="data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode(),
        findings=sentences(compared),
        rows=[_cells(row) for row in rows],
        fairness=[_fairness_cells(one) for one in fairness],
        facts=json.dumps(facts, indent=1),
        task=rows[0].task,
    )
    target = folder / "downstream.html"
    write_whole(target, page)
    return target


def comparisons_of(rows: Sequence[DownstreamRow]) -> list[Comparison]:
    """Every pretrained mode against every yardstick with the same labels, on the same test patients."""
    by_key = {(r.mode, r.labels, r.test, r.metric): r for r in rows if r.resamples}

    return [
        compare(
            measured(asdict(row), _MODES.get(mode, mode)), measured(asdict(rival), YARDSTICKS[name]), name
        )
        for (mode, labels, test, metric), row in by_key.items()
        if mode in (*PRETRAINED, "federated")
        for name in YARDSTICKS
        if (rival := by_key.get((name, labels, test, metric))) is not None
    ]


def _finite(value: Any) -> Any:
    """JSON values, with null for what is not a number."""
    match value:
        case dict():
            return {key: _finite(own) for key, own in value.items()}
        case list() | tuple():
            return [_finite(own) for own in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


def draw_downstream(rows: Sequence[DownstreamRow], path: Path) -> Path:
    """Draw each metric over labelled patients: a row of panels per test set, a line per mode."""
    tests = list(dict.fromkeys(row.test for row in rows))
    metrics = list(dict.fromkeys(row.metric for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    figure = Figure(figsize=(3.6 * len(metrics) + 0.6, 2.7 * len(tests) + 0.5), layout="constrained")
    panels = figure.subplots(len(tests), len(metrics), squeeze=False)
    for line, test in zip(panels, tests, strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            style_axes(axes, f"{metric_of(metric).title}, {_TESTS.get(test, test)}")
            axes.set_xlabel("patients with labels", fontsize=8, color=INK)
            for mode, colour in zip(modes, SITE_COLOURS, strict=False):
                own = {
                    r.labelled: r for r in rows if (r.test, r.metric, r.mode) == (test, metric, mode)
                }  # shares that come to the same patients are one point
                known = [r for _, r in sorted(own.items()) if not math.isnan(r.value)]
                if not known:
                    continue
                x = [r.labelled for r in known]
                spread = [[r.value - r.low for r in known], [r.high - r.value for r in known]]
                axes.errorbar(
                    x, [r.value for r in known], spread, marker="o", markersize=4, capsize=2,
                    linewidth=1.2, color=colour, label=_MODES.get(mode, mode),
                )  # fmt: skip
            axes.set_xscale("log")
    panels[0][0].legend(fontsize=7, frameon=False)
    return save(figure, path)


def _cells(row: DownstreamRow) -> dict[str, str]:
    known = not math.isnan(row.value)
    digits = metric_of(row.metric).digits
    return {
        "test": _TESTS.get(row.test, row.test),
        "mode": _MODES.get(row.mode, row.mode),
        "share": f"{row.labels} ({row.labelled})",
        "draws": f"{row.draws}" + (f", deviation {row.spread:.{digits}f}" if row.draws > 1 else ""),
        "metric": metric_of(row.metric).title,
        "value": f"{row.value:.{digits}f}" if known else "none",
        "interval": f"{row.low:.{digits}f} to {row.high:.{digits}f}" if known else "",
        "patients": f"{row.patients}" + (f", {row.undefined} without a value" if row.undefined else ""),
    }


def _fairness_cells(one: Fairness) -> dict[str, str]:
    groups = [f"{name}: {value:.3f} ({one.patients[name]})" for name, value in one.groups.items()]
    return {
        "test": _TESTS.get(one.test, one.test),
        "mode": _MODES.get(one.mode, one.mode),
        "share": one.labels,
        "metric": metric_of(one.metric).title,
        "grouping": one.grouping,
        "score": f"{one.score:.3f}",
        "groups": "; ".join(groups),
    }
