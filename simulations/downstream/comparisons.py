"""Is a pretrained network above the yardsticks? Differences with intervals, paired by test patient; in words.

Everybody is measured on the same resamples of the same test patients, so that the difference of two networks
has an interval of its own, narrower than either's. A row is "above" a yardstick when this interval is above
0; anything else is said in words, first. Dice that the mean label map wins is Dice that needs no scan:
comparisons of it are withdrawn.
What this file does not do: it trains and measures nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meduet_models.downstream.tasks import metric_of
from simulations.downstream.draws import rank_of

YARDSTICKS = {
    "label_map": "the mean training label, which reads no scan",
    "ridge": "ridge on raw latents, own token",
    "ridge_neighbours": "ridge on raw latents, 27 tokens",
    "random": "the random encoder",
    "unet_volume": "the U-Net on the volume",
}
"""What a pretrained network has to be above, and what it is called."""
LABEL_MAP = "label_map"
_FIELDS = (
    "task", "test", "labels", "draws", "value", "resamples", "first_draws", "first_value", "first_resamples",
)  # fmt: skip
_TESTS = {"seen": "hospitals that took part", "held_out": "the hospital held out"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number of one network on one test set, on every resample of its patients."""

    task: str
    metric: str
    test: str
    labels: str
    """How many labels, by name."""
    who: str
    """The network, as people call it."""
    draws: int
    """Draws of labelled patients that the value is averaged over."""
    value: float
    resamples: Sequence[float]
    first_draws: int
    """The same over the first draws alone, as many as what is trained has."""
    first_value: float
    first_resamples: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One network against one yardstick."""

    task: str
    metric: str
    test: str
    labels: str
    who: str
    rival: str
    """Name among the yardsticks."""
    difference: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """Whether the paired interval is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def measured(row: Mapping[str, Any], who: str) -> Measured:
    """A row of a downstream table, as values by name."""
    fields = {name: row[name] for name in _FIELDS}
    return Measured(**fields, metric=metric_of(row["metric"]).title, who=who)


def compare(own: Measured, yardstick: Measured, rival: str) -> Comparison:
    """Difference and its 95% interval over resamples that both have; over the same draws of labelled
    patients, where one has more than the other over the first of them.

    Raises `ValueError` when the two were not measured on the same resamples.
    """
    one, other = (own.value, own.resamples), (yardstick.value, yardstick.resamples)
    if own.draws != yardstick.draws:
        one, other = (
            (own.first_value, own.first_resamples),
            (yardstick.first_value, yardstick.first_resamples),
        )
    if len(one[1]) != len(other[1]) or not len(one[1]):
        raise ValueError(
            f"Expected {own.who} and {yardstick.who} on the same resamples of patients; got "
            f"{len(one[1])} and {len(other[1])}."
        )
    apart = np.array(one[1], dtype=float) - np.array(other[1], dtype=float)
    apart = apart[np.isfinite(apart)]
    low, high = (float(v) for v in np.quantile(apart, [0.025, 0.975])) if len(apart) else (math.nan,) * 2
    return Comparison(
        task=own.task,
        metric=own.metric,
        test=own.test,
        labels=own.labels,
        who=own.who,
        rival=rival,
        difference=one[0] - other[0],
        low=low,
        high=high,
    )


def withdrawn(comparisons: Iterable[Comparison]) -> set[tuple[str, str, str, str, str]]:
    """(task, metric, test, labels, who) whose comparisons say nothing: the mean label is not below them."""
    return {
        (one.task, one.metric, one.test, one.labels, one.who)
        for one in comparisons
        if one.rival == LABEL_MAP and not one.above
    }


def sentences(comparisons: Sequence[Comparison], with_numbers: bool = True) -> list[str]:
    """What is to be read first: of every network which yardsticks it is not above, and with how many labels.

    Empty without comparisons.
    """
    said: list[str] = []
    whose = dict.fromkeys((one.task, one.metric, one.test, one.who) for one in comparisons)
    for task, metric, test, who in whose:
        own = [c for c in comparisons if (c.task, c.metric, c.test, c.who) == (task, metric, test, who)]
        missed = {
            rival: sorted(
                (c for c in own if c.rival == rival and not c.above), key=lambda c: rank_of(c.labels)
            )
            for rival in YARDSTICKS
        }
        words = [
            f"{YARDSTICKS[rival]} (labels of {_listed(below, with_numbers)})"
            for rival, below in missed.items()
            if below
        ]
        where = f"{task}, {metric}, {_TESTS.get(test, test.replace('_', ' '))}"
        if words:
            said.append(f"{who} is not above {'; nor above '.join(words)}. {where}.")
        else:
            said.append(f"{who} is above every yardstick at every number of labels. {where}.")
        if missed.get(LABEL_MAP):
            said.append(
                f"Comparisons of {who} ({where}) are withdrawn where the mean training label, which reads no "
                "scan, is not below it."
            )
    return said


def _listed(comparisons: Sequence[Comparison], with_numbers: bool) -> str:
    return ", ".join(f"{one.labels}: {one}" if with_numbers else one.labels for one in comparisons)
