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
from simulations.downstream.comparisons import Comparison
from simulations.downstream.draws import rank_of
from simulations.downstream.settings import PRETRAINED
from simulations.findings import START, at_its_start

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
    ("hidden_error", "error at hidden tokens"),
    ("hidden_error_ridge", "… of the neighbours' ridge"),
    ("site_from_content_fitted", "site from content, people fitted on"),
    ("site_from_content", "site from content, fresh people"),
    ("site_from_content_mlp", "… by MLP"),
    ("site_from_content_given_covariates", "… without age and sex"),
    ("site_from_covariates", "site from age and sex alone"),
    ("site_from_code_fitted", "site from code, people fitted on"),
    ("site_from_code", "site from code, fresh people"),
    ("site_from_code_mlp", "… by MLP"),
    ("site_from_style", "site from style"),
    ("patient_from_content", "patient from content"),
    ("patient_from_code", "patient from code"),
    ("patient_from_style", "patient from style"),
    ("anatomy_from_content", "anatomy from content (R²)"),
    ("anatomy_from_style", "anatomy from style (R²)"),
    ("anatomy_from_code", "anatomy from code (R²)"),
    ("content_through_style", "content through style (R²)"),
    ("style_gap_closed", "style gap closed"),
    ("counterfactual_psnr", "swap (dB)"),
    ("counterfactual_psnr_histogram", "histogram matching (dB)"),
    ("counterfactual_ratio", "error against truth"),
    ("reconstruction_error", "reconstruction error"),
)
"""The probes that the tables show, and what they call them."""
RANDOM = "random"
"""The method whose encoder was not trained: a yardstick in every table of a downstream task."""
YARDSTICK_ROWS = {
    "label_map": "mean training label (reads no scan)",
    "ridge": "ridge on raw latents, own token",
    "ridge_neighbours": "ridge on raw latents, 27 tokens",
    "random": "random encoder, read in the same way",
    "scratch": "the same network from scratch",
    "unet": "small U-Net over latents",
    "unet_volume": "U-Net on the volume",
}
"""By mode, what needs no pretraining, and what it is called."""
MODE_WORDS = {
    "frozen": "frozen",
    "frozen_tokens": "frozen, all tokens",
    "finetuned": "fine-tuned",
    "joined": "joined to a U-Net on the volume",
}
GROUPS = {"seen": "hospitals that took part", "all": "with the hospital held out"}


@dataclass(frozen=True)
class Number:
    """One number of one cell: a row of benchmark.csv."""

    data: str
    method: str
    seed: int
    measure: str
    """`<group>.<probe>`, or `downstream.<task>.<metric>.<test>.<mode>.<labels>`."""
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


def downstream_measure(task: str, metric: str, test: str, mode: str, labels: str) -> str:
    """Name of a downstream number."""
    return f"downstream.{task}.{metric}.{test}.{mode}.{labels}"


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
            measure = downstream_measure(*(row[k] for k in ("task", "metric", "test", "mode", "labels")))
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
    data: str,
    titles: Mapping[str, str],
    summaries: Summaries,
    failed: Mapping[tuple[str, str], str],
    comparisons: Sequence[Comparison] = (),
) -> list[Table]:
    """The tables of a data set, a row per method of `titles` and per yardstick; `failed` has errors by (data,
    method), `comparisons` are those of the data set."""
    return [
        *_probe_tables(data, titles, summaries, failed),
        *_downstream_tables(data, titles, summaries, failed, comparisons),
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
        people = [
            f"{summary.value:.0f} {label}"
            for name, label in (
                ("fitted_patients_per_site", "people fitted on"),
                ("fresh_patients_per_site", "fresh people"),
            )
            if (summary := _first(data, f"{group}.{name}", summaries)) is not None
        ]
        title = f"{data}: probes, {words}" + (f" (chance: {', '.join(chances)})" if chances else "")
        title += f"; at the smallest hospital {' and '.join(people)}" if people else ""
        started = {
            method: f"{own} ({START})" if at_its_start(_measured(data, method, group, summaries)) else own
            for method, own in titles.items()
        }
        named = tuple((started[method], *row) for method, row in rows.items())
        tables.append(Table(title, ("method", *(label for _, label in columns)), named))
    return tables


def _downstream_tables(
    data: str,
    titles: Mapping[str, str],
    summaries: Summaries,
    failed: Mapping[tuple[str, str], str],
    comparisons: Sequence[Comparison],
) -> list[Table]:
    """One table per task, metric and way of reading an encoder, every yardstick in each; columns are tests
    and numbers of labels, and which yardsticks the row is not above."""
    found: dict[tuple[str, str], dict[str, set[tuple[str, str]]]] = {}
    for own, _, measure in summaries:
        if own == data and measure.startswith("downstream."):
            task, metric, test, mode, labels = measure.split(".", 5)[1:]
            found.setdefault((task, metric), {}).setdefault(mode, set()).add((test, labels))
    tables = []
    for (task, metric), by_mode in sorted(found.items()):
        ways: list[str] = [mode for mode in PRETRAINED if mode in by_mode]
        for mode in ways or [""]:
            columns = set[tuple[str, str]]().union(*by_mode.values())
            ordered = sorted(columns, key=lambda column: (column[0] != "seen", column[0], rank_of(column[1])))

            def measures(own: str, ordered: Sequence[tuple[str, str]] = ordered) -> list[str]:
                return [downstream_measure(task, metric, test, own, labels) for test, labels in ordered]  # noqa: B023

            missing = {key: error for key, error in failed.items() if key[0] == data}
            titled = {m: t for m, t in titles.items() if m != RANDOM} if mode else {}
            rows = _rows(data, titled, measures(mode), summaries, missing)
            below = {m: _not_above(comparisons, who(t, mode)) for m, t in titled.items()}
            named = [
                (titled[method], *row, below[method])
                for method, row in rows.items()
                if any((data, method, measure) in summaries for measure in measures(mode))
                or method in {key[1] for key in missing}
            ]
            for own, label in YARDSTICK_ROWS.items():
                holders = [RANDOM] if own == "random" else [m for m in titles if m != RANDOM]
                words = measures((mode or "frozen") if own == "random" else own)
                filled = next(
                    (r for m in holders for r in _rows(data, {m: ""}, words, summaries, {}).values()), None
                )
                if filled is not None:
                    named.append((label, *filled, ""))
            header = tuple(f"{test.replace('_', ' ')}, labels of {labels}" for test, labels in ordered)
            title = f"{data}: {task}, {metric_of(metric).title}" + (f", {MODE_WORDS[mode]}" if mode else "")
            tables.append(Table(title, ("method", *header, "not above"), tuple(named)))
    return tables


def who(title: str, mode: str) -> str:
    """What a method read in one way is called."""
    return f"{title}, {MODE_WORDS[mode]}" if mode else title


def _not_above(comparisons: Sequence[Comparison], name: str) -> str:
    """The yardsticks that a row is not above, with the numbers of labels."""
    below: dict[str, set[str]] = {}
    for one in comparisons:
        if one.who == name and not one.above:
            below.setdefault(one.rival, set()).add(one.labels)
    return "; ".join(
        f"{YARDSTICK_ROWS[rival]}: {', '.join(sorted(labels, key=rank_of))}"
        for rival, labels in below.items()
    )


def _rows(
    data: str,
    titles: Mapping[str, str],
    measures: Sequence[str],
    summaries: Summaries,
    failed: Mapping[tuple[str, str], str],
) -> dict[str, tuple[str, ...]]:
    """Cells by method, of those that have any."""
    rows = {}
    for method in titles:
        cells = [str(summaries.get((data, method, measure), "")) for measure in measures]
        if (error := failed.get((data, method))) is not None:
            cells[0] = f"{cells[0]} failed: {error}".strip().replace("|", "/")
        if any(cells):
            rows[method] = tuple(cells)
    return rows


def _measured(data: str, method: str, group: str, summaries: Summaries) -> dict[str, float]:
    """The probes of a method, by name."""
    return {
        measure.removeprefix(f"{group}."): summary.value
        for (own, whose, measure), summary in summaries.items()
        if (own, whose) == (data, method) and measure.startswith(f"{group}.")
    }


def measured_of(data: str, method: str, summaries: Summaries) -> dict[str, float]:
    """The probes of a method at the hospitals that took part, by name."""
    return _measured(data, method, "seen", summaries)


def _first(data: str, measure: str, summaries: Summaries) -> Summary | None:
    return next((s for (own, _, name), s in summaries.items() if own == data and name == measure), None)
