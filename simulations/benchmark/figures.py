"""The pictures of the benchmark: probes against each other, style gaps, downstream by share of labels.

Reads summaries, writes PNG files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meduet_models.downstream.tasks import metric_of
from simulations.benchmark.aims import OURS
from simulations.benchmark.tables import MODE_WORDS, YARDSTICK_ROWS, Summaries, Summary
from simulations.downstream.draws import rank_of
from simulations.report.figures import BAD, GOOD, INK, MUTED, SITE_COLOURS, save, style_axes


def draw_factors(data: str, titles: Mapping[str, str], summaries: Summaries, path: Path) -> Path | None:
    """Draw site from content against patient from content, a point per method; None if nobody was probed."""
    points = {
        method: (site, patient)
        for method in titles
        if (site := summaries.get((data, method, "seen.site_from_content"))) is not None
        and (patient := summaries.get((data, method, "seen.patient_from_content"))) is not None
    }
    if not points:
        return None
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (method, (site, patient)) in enumerate(points.items(), start=1):
        colour = GOOD if method == OURS else INK
        axes.errorbar(
            site.value, patient.value, xerr=_bar(site), yerr=_bar(patient), color=colour, marker="o",
            markersize=6 if method == OURS else 4, linewidth=0, elinewidth=0.6, alpha=0.9,
        )  # fmt: skip
        axes.annotate(
            str(number), (site.value, patient.value), (4, 4), textcoords="offset points", fontsize=8,
            color=colour,
        )  # fmt: skip
        axes.plot([], [], " ", label=f"{number}  {titles[method]}")
    chance = summaries.get((data, next(iter(points)), "seen.chance_site"))
    if chance is not None:
        axes.axvline(chance.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("hospital read from content (balanced accuracy; dashed: chance)", fontsize=8, color=MUTED)
    style_axes(axes, f"{data}: what content still knows (aim: upper left)", "patient recognised from content")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=0, handletextpad=0)
    return save(figure, path)


def draw_gaps(data: str, titles: Mapping[str, str], summaries: Summaries, path: Path) -> Path | None:
    """Draw the share of the style gap that a swap closes, a bar per method; None when nobody was probed."""
    found = {
        method: gap
        for method in titles
        if (gap := summaries.get((data, method, "seen.style_gap_closed"))) is not None
    }
    if not found:
        return None
    figure = Figure(figsize=(8.2, 0.3 * len(found) + 0.9), layout="constrained")
    axes = figure.subplots()
    for method, gap in found.items():
        colour = GOOD if method == OURS else BAD if gap.value < 0 else "#3d5a98"
        axes.barh(titles[method], gap.value, xerr=_bar(gap), color=colour, height=0.6)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_xlim(max(-1.0, min(0.0, *(gap.value for gap in found.values()))), 1.0)
    style_axes(axes, f"{data}: share of the style gap closed by a swap")
    axes.grid(False)
    return save(figure, path)


def draw_downstream(
    data: str, titles: Mapping[str, str], summaries: Summaries, methods: Sequence[str], path: Path
) -> Path | None:
    """Draw main metrics by number of labels, a panel per task, way of reading and test; None without any.

    Only `methods` are drawn; what needs no pretraining is in every panel.
    """
    read = {measure.split(".", 5)[4] for own, _, measure in summaries if own == data and _is_told(measure)}
    ways = [mode for mode in MODE_WORDS if mode in read] or ["frozen"]
    panels: dict[tuple[str, str, str, str], dict[str, dict[str, Summary]]] = {}
    for (own, method, measure), summary in summaries.items():
        if own == data and method in methods and _is_told(measure):
            task, metric, test, mode, labels = measure.split(".", 5)[1:]
            if metric_of(metric).main:
                for panel in (mode,) if mode in MODE_WORDS else ways:
                    line = titles[method] if mode == panel else YARDSTICK_ROWS.get(mode, mode)
                    lines = panels.setdefault((task, metric, panel, test), {})
                    lines.setdefault(line, {})[labels] = summary
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.9 * rows), layout="constrained")
    axes_of = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = sorted({line for lines in panels.values() for line in lines})
    colours = {line: SITE_COLOURS[i % len(SITE_COLOURS)] for i, line in enumerate(names)}
    for axes, ((task, metric, mode, test), lines) in zip(axes_of, sorted(panels.items()), strict=False):
        _lines(axes, lines, colours)
        where = "hospitals that took part" if test == "seen" else test.replace("_", " ")
        style_axes(axes, f"{task}, {MODE_WORDS[mode]}: {where}", metric_of(metric).title)
        axes.set_xlabel("patients with labels (of each class), or share of them", fontsize=8, color=MUTED)
    for axes in axes_of[len(panels) :]:
        axes.set_visible(False)
    handles = [axes_of[0].plot([], [], color=colours[n], marker="o", markersize=3, label=n)[0] for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save(figure, path)


def _is_told(measure: str) -> bool:
    return measure.startswith("downstream.")


def _lines(axes: Axes, lines: Mapping[str, Mapping[str, Summary]], colours: Mapping[str, str]) -> None:
    every = sorted({labels for by_labels in lines.values() for labels in by_labels}, key=rank_of)
    for line, by_labels in lines.items():
        places = [place for place, labels in enumerate(every) if labels in by_labels]
        means = [by_labels[every[place]] for place in places]
        values = [own.value for own in means]
        axes.plot(places, values, color=colours[line], marker="o", markersize=3, linewidth=1.4)
        bands = [
            (place, own.low, own.high)
            for place, own in zip(places, means, strict=True)
            if own.low is not None and own.high is not None
        ]
        if bands:
            x, low, high = zip(*bands, strict=True)
            axes.fill_between(x, low, high, color=colours[line], alpha=0.12, linewidth=0)
    axes.set_xticks(range(len(every)), every)


def _bar(summary: Summary) -> list[list[float]] | None:
    """Lengths of an error bar below and above, [[below], [above]]."""
    if summary.low is None or summary.high is None:
        return None
    return [[max(0.0, summary.value - summary.low)], [max(0.0, summary.high - summary.value)]]
