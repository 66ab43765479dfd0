"""The pictures of a run: curves over rounds, and anatomy in every hospital's style.

Reads numbers and volumes, writes PNG files; knows nothing of models or messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from storage.files import whole_file

Volume = NDArray[np.float32]

INK, MUTED, GRID = "#1b2733", "#6b7a89", "#e3e8ee"
GOOD, BAD = "#0b7a75", "#d1495b"
KIND_COLOURS = {
    "original": "#ffffff",
    "reconstruction": "#9fb3c8",
    "restyled": "#c3a6ff",
    "swap": "#ffb86b",
    "truth": "#7bdcb5",
}
SITE_COLOURS = ("#0b7a75", "#d1495b", "#3d5a98", "#e09f3e", "#6a4c93", "#4f772d", "#9c6644", "#2b2d42")
PLANES = ("sagittal", "coronal", "axial")
_LABELS = {
    "reconstruction": "reconstruction, hidden tokens",
    "visible_reconstruction": "reconstruction, visible tokens",
    "restyled_reconstruction": "reconstruction, restyled scans",
    "site_adversary": "site read from content (adversary)",
    "site_from_style": "site read from style",
    "mftd": "MFTD",
    "siqc": "SiQC",
    "invariance": "invariance",
    "anchor": "anchor of the style branch",
    "proximal": "distance to the shared weights",
    "total": "total",
}
"""Terms in the order of their panels; one that is not here comes after them, under its name."""


@dataclass(frozen=True)
class SwapRow:
    """One scan beside what the model makes of it; every volume is [x, y, z] in [0, 1]."""

    site: str
    """Hospital of the scan."""
    original: Volume
    """The prepared scan."""
    reconstruction: Volume
    """Its own content in its own style."""
    restyled: Mapping[str, Volume]
    """Its latents moved to each other hospital's entry in the style bank: what training shows the model."""
    swaps: Mapping[str, Volume]
    """Its content in the style of each other hospital, as the model decodes it."""
    truths: Mapping[str, Volume]
    """The same patient really rendered by the other hospitals' scanners, where that is known."""


def style_axes(axes: Axes, title: str, ylabel: str = "") -> None:
    """The look of every panel: title at the left, quiet axes."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure on white; its path."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=170, facecolor="white")
    return path


def loss_terms(rounds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every loss term that any hospital told in any round, with its title; one without a title is called by
    its name. Of secure sums only the mean over hospitals is known."""
    terms = {term for entry in rounds for losses in _told(entry).values() for term in losses}
    ordered = [*(term for term in _LABELS if term in terms), *sorted(terms - set(_LABELS))]
    return {term: _LABELS.get(term, term) for term in ordered}


def _told(entry: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Losses of a round by hospital, or of all together where that is all there is."""
    losses = {name: site["loss"] for name, site in entry["sites"].items() if site["loss"]}
    return losses or {"mean of all": entry.get("loss", {})}


def draw_losses(rounds: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw every loss term that any hospital told over rounds, a line per hospital; of secure sums, the
    mean."""
    sites = sorted({name for entry in rounds for name in _told(entry)})
    terms = loss_terms(rounds)
    columns = min(4, len(terms))
    rows = -(-len(terms) // columns)
    figure = Figure(figsize=(10.5, 2.35 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, term in zip(panels.flat, terms, strict=False):
        for colour, site in zip(SITE_COLOURS, sites, strict=False):
            points = [
                (entry["round"], _told(entry)[site][term])
                for entry in rounds
                if term in _told(entry).get(site, {})
            ]
            if points:
                x, y = zip(*points, strict=True)
                alone = {"marker": "o", "markersize": 3} if len(points) == 1 else {}  # a line of one is none
                axes.plot(x, y, color=colour, linewidth=1.6, label=site, **alone)
        style_axes(axes, terms[term])
    for axes in panels.flat[len(terms) :]:
        axes.set_visible(False)
    first, last = rounds[0]["round"], rounds[-1]["round"]
    for axes in panels.flat:
        axes.set_xlim(first - 0.3, last + 0.3)  # the same for a term that sets in late
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels[-1]:
        axes.set_xlabel("round", fontsize=8, color=MUTED)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return save(figure, path)


def draw_probes(rounds: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the fresh probes over rounds, with their chance levels."""
    measured = [entry for entry in rounds if entry.get("probes")]
    x = [entry["round"] for entry in measured]

    def series(name: str) -> list[float]:
        return [entry["probes"].get(name, float("nan")) for entry in measured]

    last = measured[-1]["probes"]
    candidates: list[tuple[str, list[tuple[str, str, str]], float]] = [
        (
            "Which hospital? (balanced accuracy, fresh probe)",
            [("site_from_content", "from content", BAD), ("site_from_style", "from style", GOOD)],
            last.get("chance_site", 0.0),
        ),
        (
            "Which patient, in another style? (top-1)",
            [("patient_from_content", "from content", GOOD), ("patient_from_style", "from style", BAD)],
            last.get("chance_patient", 0.0),
        ),
        ("Swaps: share of the style gap closed", [("style_gap_closed", "swap", "#3d5a98")], 0.0),
    ]
    panels = [panel for panel in candidates if panel[1][0][0] in last]
    figure = Figure(figsize=(3.5 * len(panels), 2.9), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves, chance) in zip(all_axes, panels, strict=True):
        for name, label, colour in curves:
            axes.plot(x, series(name), color=colour, marker="o", markersize=4, label=label)
        axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        lowest = min((v for name, _, _ in curves for v in series(name) if v == v), default=0.0)
        axes.set_ylim(min(0.0, lowest - 0.05), 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("round", fontsize=8, color=MUTED)
        axes.legend(frameon=False, fontsize=8, loc="best")
        style_axes(axes, title)
    return save(figure, path)


def middle_slice(volume: Volume, plane: int) -> Volume:
    """The middle slice of plane 0 (sagittal), 1 (coronal), 2 (axial), head up."""
    cut = np.take(volume, volume.shape[plane] // 2, axis=plane)
    return np.flipud(cut.T)


def draw_swaps(row: SwapRow, path: Path, zoom: int = 3) -> Path:
    """Draw one scan in three planes: original, reconstruction, and every other hospital's style."""
    columns: list[tuple[str, str, Volume]] = [
        ("original", row.site, row.original),
        ("reconstruction", f"{row.site} style", row.reconstruction),
    ]
    for site in row.swaps:
        for kind, volumes in (("restyled", row.restyled), ("swap", row.swaps), ("truth", row.truths)):
            if site in volumes:
                columns.append(
                    (kind, f"scanned at {site}" if kind == "truth" else f"{site} style", volumes[site])
                )
    heights = [middle_slice(row.original, plane).shape[0] for plane in range(3)]
    widest = max(middle_slice(row.original, plane).shape[1] for plane in range(3))
    inch = zoom / 66
    figure = Figure(
        figsize=(len(columns) * widest * inch * 1.04, sum(heights) * inch * 1.04 + 0.7), facecolor="#10161d"
    )
    panels = figure.subplots(
        3, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights, "wspace": 0.03, "hspace": 0.03}
    )
    top = 1 - 0.6 / figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=top)
    for column, (kind, caption, volume) in enumerate(columns):
        for plane in range(3):
            axes = panels[plane, column]
            axes.imshow(middle_slice(volume, plane), cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            axes.set_facecolor("#10161d")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        panels[0, column].set_title(
            f"{kind}\n{caption}", fontsize=11, color=KIND_COLOURS[kind], linespacing=1.25
        )
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150, facecolor=figure.get_facecolor())
    return path


def draw_traffic(sizes: Mapping[str, int], path: Path) -> Path:
    """Draw bytes per hospital and round by what they are, on a logarithmic axis."""
    figure = Figure(figsize=(10.5, 0.42 * len(sizes) + 0.6), layout="constrained")
    axes = figure.subplots()
    names, values = list(sizes), [max(1, v) for v in sizes.values()]
    axes.barh(names, values, color="#3d5a98", height=0.55)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(False)
    for name, value in zip(names, values, strict=True):
        text = human_bytes(value)
        axes.annotate(text, (value, name), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(right=max(values) * 6)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return save(figure, path)


def human_bytes(count: float) -> str:
    """`count` bytes as a person reads it (1 kB = 1000 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
