"""The pictures of a generative model: samples over seeds, contents by styles, nearest real scans, steps.

Reads volumes and numbers, writes PNG files; knows nothing of models. Volumes are [x, y, z] in [0, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.report.figures import (
    BAD,
    GOOD,
    KIND_COLOURS,
    MUTED,
    PLANES,
    Volume,
    middle_slice,
    save,
    style_axes,
)
from storage.files import whole_file

_DARK = "#10161d"
_INCH = 3 / 66  # of a voxel
_BETWEEN = 4  # voxels between two volumes


@dataclass(frozen=True)
class Cell:
    """One volume of a figure."""

    caption: str
    """Above it; may be empty."""
    volume: Volume
    """What is shown."""
    kind: str = "original"
    """Which colour the caption has: a key of `KIND_COLOURS`."""


def draw_gallery(rows: Mapping[str, Sequence[Cell]], path: Path) -> Path:
    """Draw a row for each thing told, its samples side by side in three planes."""
    cells = max(len(row) for row in rows.values())
    example = next(iter(rows.values()))[0].volume
    cuts = [middle_slice(example, plane).shape for plane in range(3)]
    widths = [width for _ in range(cells) for width in (*(cut[1] for cut in cuts), _BETWEEN)]
    height = max(cut[0] for cut in cuts)
    figure, panels = _dark(len(rows), widths, [height] * len(rows), left=1.0, zoom=0.7)
    for line, (kind, row) in enumerate(rows.items()):
        for place, cell in enumerate(row):
            for plane in range(3):
                axes = panels[line][4 * place + plane]
                _show(axes, middle_slice(cell.volume, plane))
            panels[line][4 * place + 1].set_title(
                cell.caption, fontsize=9, color=KIND_COLOURS[cell.kind], pad=3
            )
        _label(panels[line][0], kind)
    return _save_dark(figure, path)


def draw_grid(rows: Mapping[str, Sequence[Cell]], path: Path, plane: int = 1) -> Path:
    """Draw a row per patient: the scan, then its content in the style of each site, truth beside it."""
    first = next(iter(rows.values()))
    cut = middle_slice(first[0].volume, plane).shape
    figure, panels = _dark(len(rows), [cut[1]] * len(first), [cut[0]] * len(rows), left=0.8, zoom=1.1)
    for line, (patient, row) in enumerate(rows.items()):
        for axes, cell in zip(panels[line], row, strict=True):
            _show(axes, middle_slice(cell.volume, plane))
            if line == 0 or cell.kind == "original":
                axes.set_title(cell.caption, fontsize=9, color=KIND_COLOURS[cell.kind], pad=3)
        _label(panels[line][0], patient)
    figure.text(0.008, 0.008, f"{PLANES[plane]} slices", ha="left", va="bottom", fontsize=8, color="#6b7a89")
    return _save_dark(figure, path)


def draw_nearest(pairs: Sequence[tuple[Cell, Cell]], path: Path) -> Path:
    """Draw each sample beside the real training scan that is nearest to it, in three planes, two to a row."""
    rows = {
        f"{first + 1} and {first + 2}" if len(pairs) > first + 1 else f"{first + 1}": [
            cell for pair in pairs[first : first + 2] for cell in pair
        ]
        for first in range(0, len(pairs), 2)
    }
    return draw_gallery(rows, path)


def draw_steps(counts: Sequence[Mapping[str, float]], kind: str, path: Path) -> Path:
    """Draw the Fréchet distance and the error of the solver over the number of solver steps."""
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [count["steps"] for count in counts]
    left.plot(x, [count["frechet"] for count in counts], color="#3d5a98", marker="o", markersize=4)
    finest = counts[-1]["frechet"]
    left.axhspan(0.98 * finest, 1.02 * finest, color=GOOD, alpha=0.18, linewidth=0)
    style_axes(left, f"Fréchet distance (band: 2% around {x[-1]:.0f} steps)")
    errors = [count["solver_error"] for count in counts[:-1]]
    right.plot(x[:-1], errors, color=BAD, marker="o", markersize=4)
    if max(errors) > 0:
        right.set_yscale("log")
    style_axes(right, f"Distance to the samples of {x[-1]:.0f} steps, over their deviation")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{steps:.0f}" for steps in x])
        axes.minorticks_off()
        axes.set_xlabel(f"solver steps; told: {kind}", fontsize=8, color=MUTED)
    return save(figure, path)


def _dark(
    rows: int, widths: Sequence[int], heights: Sequence[int], *, left: float, zoom: float = 1.0
) -> tuple[Figure, list[list[Axes]]]:
    """A dark figure with a panel for each cut, in true proportions; `left`: inches for the rows' names."""
    gap, above = 0.03, 0.3  # of a panel's width; inches over each row
    across, down = sum(widths) * _INCH * zoom, sum(heights) * _INCH * zoom
    size = left + across * (1 + gap), down + above * rows + 0.1
    figure = Figure(figsize=size, facecolor=_DARK)
    spaces = {"wspace": gap, "hspace": above * rows / down}
    panels = figure.subplots(
        rows, len(widths), squeeze=False,
        gridspec_kw={"width_ratios": widths, "height_ratios": heights, **spaces},
    )  # fmt: skip
    figure.subplots_adjust(left=left / size[0], right=0.995, bottom=0.1 / size[1], top=1 - above / size[1])
    for axes in panels.flat:
        axes.axis("off")
    return figure, [list(line) for line in panels]


def _show(axes: Axes, cut: Volume) -> None:
    axes.imshow(cut, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")


def _label(axes: Axes, text: str) -> None:
    """The name of a row, left of its first panel."""
    axes.annotate(
        text.replace(", ", ",\n"), (0, 0.5), (-6, 0), xycoords="axes fraction", textcoords="offset points",
        ha="right", va="center", fontsize=9, color="#c9d3dd",
    )  # fmt: skip


def _save_dark(figure: Figure, path: Path) -> Path:
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=130, facecolor=_DARK)
    return path
