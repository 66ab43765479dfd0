"""The study of the diffusion model as files: study.json, study.csv, a figure, a page.

Reads what the cells told and writes it; trains and measures nothing.
"""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from simulations.generation.quality import FIXED
from simulations.report.figures import INK, SITE_COLOURS, save, style_axes
from storage.files import private_folder, write_whole

_TEMPLATES = Path(__file__).resolve().parents[1]
_TEMPLATE = "diffusion_study/report.html"
_STARTS = {"scratch": "from scratch", "encoder": "from the federated encoder", "pooled": "from pooled MeDUET"}
_SOURCES = {
    "raw": "all sites' latents at the centre",
    "federated": "trained at the sites",
    "pooled": "pooled data, pooled encoder",
    "site": "best single site",
}
_SHOWN = ("Fréchet distance", "kernel distance", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Curve:
    """One model while it learns."""

    start: str
    told: tuple[str, ...]
    seed: int
    points: list[tuple[int, float]]
    """Steps, and loss on test patients."""


def write_study(
    folder: Path, curves: Sequence[Curve], sources: Mapping[str, Any], facts: Mapping[str, Any]
) -> Path:
    """Write everything below `folder`; returns the page's path."""
    private_folder(folder)
    rows = summary(curves)
    record = {
        "facts": facts,
        "curves": [vars(curve) for curve in curves],
        "summary": rows,
        "sources": sources,
    }
    write_whole(folder / "study.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["told", "start", "seed", "step", "loss"])
    for curve in curves:
        writer.writerows(
            ["+".join(curve.told), curve.start, curve.seed, step, f"{loss:.6f}"]
            for step, loss in curve.points
        )
    write_whole(folder / "study.csv", table.getvalue())
    figure = draw_curves(curves, folder / "figures" / "convergence.png").read_bytes() if curves else b""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(_TEMPLATE).render(
        figure="data:image/png;base64," + base64.b64encode(figure).decode(),
        rows=rows,
        starts=_STARTS,
        sources=[_title(name, source) for name, source in sources.items()],
        losses=[
            _interval(source["loss"], source["loss_low"], source["loss_high"]) for source in sources.values()
        ],
        compared=compared(sources) if sources else [],
        facts=json.dumps(facts, indent=1),
    )
    target = folder / "study.html"
    write_whole(target, page)
    return target


def _title(name: str, source: Mapping[str, Any]) -> str:
    return _SOURCES[name] + (f" ({source['site']})" if source.get("site") else "")


def summary(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Per condition and start: last loss over seeds, and by which step scratch's last loss was reached."""
    rows = []
    for conditions in dict.fromkeys(curve.told for curve in curves):
        scratch = [c for c in curves if c.told == conditions and c.start == "scratch"]
        bar = {c.seed: c.points[-1][1] for c in scratch}
        for start in dict.fromkeys(curve.start for curve in curves):
            own = [c for c in curves if c.told == conditions and c.start == start]
            last = [c.points[-1][1] for c in own]
            reached = [
                next((step for step, loss in c.points if loss <= bar[c.seed]), None)
                for c in own
                if c.seed in bar
            ]
            known = [step for step in reached if step is not None]
            rows.append(
                {
                    "told": " and ".join(conditions),
                    "start": start,
                    "seeds": len(own),
                    "last": fmean(last),
                    "spread": stdev(last) if len(last) > 1 else None,
                    "reached": fmean(known) if len(known) == len(reached) and known else None,
                    "steps": own[0].points[-1][0],
                }
            )
    return rows


def draw_curves(curves: Sequence[Curve], path: Path) -> Path:
    """Draw a panel per condition, a line per start (mean over seeds), a band from lowest to highest seed."""
    conditions = list(dict.fromkeys(curve.told for curve in curves))
    figure = Figure(figsize=(3.6 * len(conditions) + 0.4, 3.1), layout="constrained")
    panels = figure.subplots(1, len(conditions), squeeze=False)[0]
    for axes, names in zip(panels, conditions, strict=True):
        style_axes(axes, f"told {' and '.join(names)}", "loss on test patients")
        axes.set_xlabel("optimiser steps", fontsize=8, color=INK)
        for start, colour in zip(_STARTS, SITE_COLOURS, strict=False):
            own = [c for c in curves if c.told == names and c.start == start]
            if not own:
                continue
            steps = [step for step, _ in own[0].points][1:]  # the first is the zero prediction, for all
            losses = [[loss for _, loss in c.points][1:] for c in own]
            columns = list(zip(*losses, strict=True))
            axes.plot(steps, [fmean(c) for c in columns], color=colour, linewidth=1.5, label=_STARTS[start])
            axes.fill_between(
                steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.18
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.tick_params(which="both", labelsize=7, labelcolor=INK)
    panels[0].legend(fontsize=7, frameon=False)
    return save(figure, path)


def compared(sources: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per measure on the fixed network's features (whose encoder is whose does not matter there), a
    column per source."""
    first = next(iter(sources.values()))
    rows = []
    for place, row in enumerate(first["rows"]):
        if row["features"] != FIXED or row["measure"] not in _SHOWN:
            continue
        same = [source["rows"][place] for source in sources.values()]
        rows.append(
            {
                "measure": row["measure"],
                "told": row["told"],
                "floor": _interval(row["floor"], row["floor_low"], row["floor_high"]),
                "values": [_interval(r["value"], r["low"], r["high"]) for r in same],
            }
        )
    return rows


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
