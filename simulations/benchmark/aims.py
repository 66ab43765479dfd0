"""What FedMeDUET aims at, and whether the benchmark's numbers meet it.

Each aim is a bound that was written down before the numbers were known; site and patient are read from the
content code where a method has one, which was made because pooled content misses them. Met or not is decided
on values; "above" asks for more: intervals that do not touch. An aim whose numbers are not there is told as
not measured, never as met.
What this file does not do: it computes no number (`benchmark_tables.py`).
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

from meduet_models.downstream.tasks import metric_of
from simulations.benchmark.tables import MODE_WORDS, Summaries, Summary, downstream_measure
from simulations.downstream.draws import rank_of

OURS, POOLED = "meduet", "pooled"
RIVALS = {"fedavg_mae": "FedAvg", "alone": "alone", "scratch": "from scratch"}
"""Methods that ours is to be above downstream."""
FEW_LABELS = ("5", "10", "5%", "10%")
"""Labelled patients that count as few."""
WITHIN = 0.02
"""Relative distance to pooled MeDUET."""
LINEAR_ABOVE_CHANCE, MLP_ABOVE_CHANCE = 0.05, 0.10
RECOGNISED = 0.95
PATIENT_FROM_STYLE_TIMES_CHANCE = 5
NEARER_DB = 3.0
_CONTENT = {"content": "pooled content", "code": "the content code"}


Withdrawn = Set[tuple[str, str]]
"""Data sets and downstream measures of ours that the mean training label is not below."""
_NO_SCAN = "the mean training label, which reads no scan, is not below it"


@dataclass(frozen=True)
class Aim:
    """An aim on a data set, and how it turned out."""

    data: str
    text: str
    """What is aimed at."""
    found: str
    """The number, in words."""
    met: bool | None
    """None: not measured, or withdrawn."""
    withdrawn: bool = False
    """Whether the comparison says nothing: what reads no scan is not below ours."""

    @property
    def verdict(self) -> str:
        """Met, not met, not measured or withdrawn."""
        if self.withdrawn:
            return "withdrawn"
        return "not measured" if self.met is None else "met" if self.met else "not met"


def aims_of(data: Sequence[str], summaries: Summaries, withdrawn: Withdrawn = frozenset()) -> list[Aim]:
    """Every aim on every data set; downstream numbers of ours that are `withdrawn` decide none."""
    return [
        aim
        for name in data
        for aim in (*_probe_aims(name, summaries), *_downstream_aims(name, summaries, withdrawn))
    ]


def _probe_aims(data: str, summaries: Summaries) -> Iterator[Aim]:
    def read(name: str, method: str = OURS) -> Summary | None:
        return summaries.get((data, method, f"seen.{name}"))

    def bounded(name: str, text: str, bound: float | None, above: bool) -> Aim:
        own = read(name)
        if own is None or bound is None:
            return Aim(data, text, "", None)
        if not above and bound >= 1:
            return Aim(data, text, f"{own}; bound {bound:.3f}: too few patients to tell", None)
        met = own.value >= bound if above else own.value <= bound
        return Aim(data, text, f"{own}; bound {bound:.3f}", met)

    content = "code" if read("site_from_code") is not None else "content"
    chance = read("chance_site")
    guess = read("chance_patient")
    site, patient = (None if c is None else c.value for c in (chance, guess))
    yield bounded(
        f"site_from_{content}",
        f"site from {_CONTENT[content]}, linear probe: chance + 5 points at most",
        None if site is None else site + LINEAR_ABOVE_CHANCE,
        above=False,
    )
    yield bounded(
        f"site_from_{content}_mlp",
        f"site from {_CONTENT[content]}, MLP probe: chance + 10 points at most",
        None if site is None else site + MLP_ABOVE_CHANCE,
        above=False,
    )
    text = f"patient from {_CONTENT[content]} across styles: 95%"
    yield bounded(f"patient_from_{content}", text, RECOGNISED, above=True)
    yield bounded("site_from_style", "site from style: 95%", RECOGNISED, above=True)
    yield bounded(
        "patient_from_style",
        "patient from style: 5 times chance at most",
        None if patient is None else PATIENT_FROM_STYLE_TIMES_CHANCE * patient,
        above=False,
    )
    pooled = read("style_gap_closed", POOLED)
    yield bounded(
        "style_gap_closed",
        "swap fidelity: at least that of pooled MeDUET",
        None if pooled is None else pooled.value,
        above=True,
    )
    matched = read("counterfactual_psnr_histogram")
    if matched is not None:
        yield bounded(
            "counterfactual_psnr",
            "swap 3 dB nearer to the truth than histogram matching",
            matched.value + NEARER_DB,
            above=True,
        )


def _downstream_aims(data: str, summaries: Summaries, withdrawn: Withdrawn) -> Iterator[Aim]:
    measures = sorted({m for own, _, m in summaries if own == data and m.startswith("downstream.")})
    found = {tuple(measure.split(".", 5)[1:]) for measure in measures}
    for task, metric in sorted({(t, m) for t, m, *_ in found if metric_of(m).main}):
        for mode in MODE_WORDS:
            own = {labels for t, m, _, whose, labels in found if (t, m, whose) == (task, metric, mode)}
            if not own:
                continue
            ordered = sorted(own, key=rank_of)
            words = f"{task} ({metric_of(metric).title}, {MODE_WORDS[mode]})"
            cases = [
                ("held_out", ordered[-1]),
                *(("seen", labels) for labels in ordered if labels in FEW_LABELS),
            ]
            aims = [
                ("seen", ordered[-1], _near_pooled(data, task, metric, mode, ordered[-1], words, summaries))
            ]
            aims += [
                (test, labels, _above_rivals(data, task, metric, mode, test, labels, words, summaries))
                for test, labels in cases
            ]
            for test, labels, aim in aims:
                taken_back = (data, downstream_measure(task, metric, test, mode, labels)) in withdrawn
                yield (
                    replace(aim, met=None, withdrawn=True, found=f"{aim.found}; {_NO_SCAN}")
                    if taken_back
                    else aim
                )


def _near_pooled(
    data: str, task: str, metric: str, mode: str, labels: str, words: str, summaries: Summaries
) -> Aim:
    text = f"{words}: within 2% of pooled MeDUET"
    measure = downstream_measure(task, metric, "seen", mode, labels)
    ours, pooled = (summaries.get((data, method, measure)) for method in (OURS, POOLED))
    if ours is None or pooled is None:
        return Aim(data, text, "", None)
    return Aim(data, text, f"{ours}; pooled {pooled}", ours.value >= (1 - WITHIN) * pooled.value)


def _above_rivals(
    data: str, task: str, metric: str, mode: str, test: str, labels: str, words: str, summaries: Summaries
) -> Aim:
    where = "on the hospital held out" if test == "held_out" else "on hospitals that took part"
    text = f"{words}, labels of {labels}, {where}: above {', '.join(RIVALS.values())}, intervals apart"
    ours = summaries.get((data, OURS, downstream_measure(task, metric, test, mode, labels)))
    rivals = {}
    for method, name in RIVALS.items():
        theirs = "scratch" if method == "scratch" else mode
        rivals[name] = summaries.get((data, method, downstream_measure(task, metric, test, theirs, labels)))
    known = {name: rival for name, rival in rivals.items() if rival is not None}
    if ours is None or len(known) < len(rivals):
        return Aim(data, text, "", None)
    apart = [
        ours.low is not None and rival.high is not None and ours.low > rival.high for rival in known.values()
    ]
    return Aim(data, text, "; ".join([str(ours), *(f"{n} {r}" for n, r in known.items())]), all(apart))
