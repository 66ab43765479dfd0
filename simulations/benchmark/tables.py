"""From the cells' results to numbers with intervals, and the tables made of them: CSV, Markdown.

Several seeds: mean and 95% t-interval over seeds. One seed: the interval over patients that the cell told
(bootstrap, downstream), or for shares of patients and probes' accuracies Wilson's interval (Wilson 1927) with
patients as the unit, as scans of one patient are no independent trials. Otherwise none.
What this file does not do: it runs nothing and judges nothing (`benchmark_aims.py`).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import norm, t

from meduet_models.downstream.tasks import metric_of

LEVEL = 0.95
SHARES = (
    "site_from_content",
    "site_from_content_mlp",
    "site_from_style",
    "site_from_code",
    "site_from_code_mlp",
    "patient_from_content",
    "patient_from_code",
    "patient_from_style",
)
"""Probes whose value is a share, with patients as trials."""
COLUMNS = (
    ("site_from_content", "site from content"),
    ("site_from_content_mlp", "… by MLP"),
    ("site_from_code", "site from code"),
    ("site_from_code_mlp", "… by MLP"),
    ("site_from_style", "site from style"),
    ("patient_from_content", "patient from content"),
    ("patient_from_code", "patient from code"),
    ("patient_from_style", "patient from style"),
    ("anatomy_from_content", "anatomy from content (R²)"),
    ("content_through_style", "content through style (R²)"),
    ("style_gap_closed", "style gap closed"),
    ("counterfactual_psnr", "swap (dB)"),
    ("counterfactual_psnr_histogram", "histogram matching (dB)"),
    ("counterfactual_ratio", "error against truth"),
    ("reconstruction_error", "reconstruction error"),
)
"""The probes that the tables show, and what they call them."""
GROUPS = {"seen": "hospitals that took part", "all": "with the hospital held out"}


@dataclass(frozen=True)
class Number:
    """One number of one cell: a row of benchmark.csv."""

    data: str
    method: str
    seed: int
    measure: str
    """`<group>.<probe>`, or `downstream.<task>.<metric>.<test>.<mode>.<label share>`."""
    value: float
    low: float | None = None
    """Interval over patients, where there is one."""
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """A number over seeds."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        """As a person reads it."""
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


Summaries = Mapping[tuple[str, str, str], Summary]
"""By (data, method, measure)."""


def downstream_measure(task: str, metric: str, test: str, mode: str, label_share: float) -> str:
    """Name of a downstream number."""
    return f"downstream.{task}.{metric}.{test}.{mode}.{label_share:g}"


def numbers_of(results: Sequence[Mapping[str, Any]]) -> list[Number]:
    """Every number of the cells that did not fail."""
    numbers = []
    for result in results:
        if "error" in result:
            continue
        where = (result["data"], result["method"], result["seed"])
        for group, measured in result["measures"].items():
            for name, value in measured.items():
                if name.endswith(("_low", "_high")):
                    continue
                low, high = measured.get(f"{name}_low"), measured.get(f"{name}_high")
                if low is None and name in SHARES:
                    low, high = wilson(value, measured["patients"])
                numbers.append(Number(*where, f"{group}.{name}", value, low, high))
        for row in result["downstream"]:
            measure = downstream_measure(*(row[k] for k in ("task", "metric", "test", "mode", "label_share")))
            numbers.append(Number(*where, measure, row["value"], row["low"], row["high"]))
        numbers += [Number(*where, f"seconds.{k}", v) for k, v in result["seconds"].items()]
    return numbers


def summarise(numbers: Sequence[Number]) -> dict[tuple[str, str, str], Summary]:
    """Over seeds, by (data, method, measure)."""
    same: dict[tuple[str, str, str], list[Number]] = {}
    for number in numbers:
        same.setdefault((number.data, number.method, number.measure), []).append(number)
    return {what: _summary(own) for what, own in same.items()}


def _summary(same: Sequence[Number]) -> Summary:
    if len(same) == 1:
        return Summary(same[0].value, same[0].low, same[0].high, 1)
    mean, half = t_interval([number.value for number in same])
    return Summary(mean, mean - half, mean + half, len(same))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; two values or more."""
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `trials`."""
    z = float(norm.ppf((1 + LEVEL) / 2))
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return (centre - half) / (1 + z**2 / trials), (centre + half) / (1 + z**2 / trials)


def csv_text(numbers: Sequence[Number]) -> str:
    """The long table."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["data", "method", "seed", "measure", "value", "low", "high"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(asdict(number) for number in numbers)
    return text.getvalue()


@dataclass(frozen=True)
class Table:
    """A table as text, for Markdown and for the page."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def tables_of(
    data: str, titles: Mapping[str, str], summaries: Summaries, failed: Mapping[tuple[str, str], str]
) -> list[Table]:
    """The tables of a data set, a row per method of `titles`; `failed` has errors by (data, method)."""
    return [
        *_probe_tables(data, titles, summaries, failed),
        *_downstream_tables(data, titles, summaries, failed),
    ]


def _probe_tables(
    data: str, titles: Mapping[str, str], summaries: Summaries, failed: Mapping[tuple[str, str], str]
) -> list[Table]:
    tables = []
    for group, words in GROUPS.items():
        measures = {measure for own, _, measure in summaries if own == data}
        columns = [(f"{group}.{name}", label) for name, label in COLUMNS if f"{group}.{name}" in measures]
        if not columns:
            continue
        chances = [
            f"{label} {summary.value:.3f}"
            for name, label in (("chance_site", "site"), ("chance_patient", "patient"))
            if (summary := _first(data, f"{group}.{name}", summaries)) is not None
        ]
        rows = _rows(data, titles, [measure for measure, _ in columns], summaries, failed)
        title = f"{data}: probes, {words}" + (f" (chance: {', '.join(chances)})" if chances else "")
        tables.append(Table(title, ("method", *(label for _, label in columns)), rows))
    return tables


def _downstream_tables(
    data: str, titles: Mapping[str, str], summaries: Summaries, failed: Mapping[tuple[str, str], str]
) -> list[Table]:
    """One table per task, metric and way of training; columns are tests and label shares."""
    found: dict[tuple[str, str, str], set[tuple[str, float]]] = {}
    for own, _, measure in summaries:
        if own == data and measure.startswith("downstream."):
            task, metric, test, mode, share = measure.split(".", 5)[1:]
            found.setdefault((task, metric, mode), set()).add((test, float(share)))
    tables = []
    for (task, metric, mode), columns in sorted(found.items()):
        ordered = sorted(columns, key=lambda column: (column[0] != "seen", column[0], column[1]))
        measures = [downstream_measure(task, metric, test, mode, share) for test, share in ordered]
        titled = {m: title for m, title in titles.items() if any((data, m, x) in summaries for x in measures)}
        missing = {key: error for key, error in failed.items() if key[1] in titled}
        header = tuple(f"{test.replace('_', ' ')}, {share:g} of labels" for test, share in ordered)
        title = f"{data}: {task}, {metric_of(metric).title}, {mode}"
        rows = _rows(data, titled, measures, summaries, missing)
        tables.append(Table(title, ("method", *header), rows))
    return tables


def _rows(
    data: str,
    titles: Mapping[str, str],
    measures: Sequence[str],
    summaries: Summaries,
    failed: Mapping[tuple[str, str], str],
) -> tuple[tuple[str, ...], ...]:
    rows = []
    for method, title in titles.items():
        cells = [str(summaries.get((data, method, measure), "")) for measure in measures]
        if (error := failed.get((data, method))) is not None:
            cells[0] = f"{cells[0]} failed: {error}".strip().replace("|", "/")
        if any(cells):
            rows.append((title, *cells))
    return tuple(rows)


def _first(data: str, measure: str, summaries: Summaries) -> Summary | None:
    return next((s for (own, _, name), s in summaries.items() if own == data and name == measure), None)
