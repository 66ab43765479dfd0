"""Every pretrained method of the benchmark against every yardstick, paired by seed and test patient.

One seed: the interval is over resamples of the same test patients. Several: the differences of the seeds and
their t-interval. What this file does not do: it judges nothing and writes nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from meduet_models.downstream.tasks import metric_of
from simulations.benchmark.tables import RANDOM, t_interval, who
from simulations.downstream.comparisons import YARDSTICKS, Comparison, compare, measured
from simulations.downstream.settings import PRETRAINED

Row = Mapping[str, Any]


def paired(data: str, results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[Comparison]:
    """The comparisons of a data set, in the order of `titles`."""
    by_seed: dict[int, dict[str, list[Row]]] = {}
    for result in results:
        if result["data"] == data and "error" not in result:
            rows = [row for row in result["downstream"] if row["value"] is not None]
            by_seed.setdefault(result["seed"], {})[result["method"]] = rows
    found: dict[tuple[str, ...], list[Comparison]] = {}
    for methods in by_seed.values():
        for one in _of_a_seed(methods, titles):
            key = (one.who, one.task, one.metric, one.test, one.labels, one.rival)
            found.setdefault(key, []).append(one)
    return [_over_seeds(same) for same in found.values()]


def _of_a_seed(methods: Mapping[str, Sequence[Row]], titles: Mapping[str, str]) -> list[Comparison]:
    def key(row: Row, mode: str) -> tuple[str, ...]:
        return mode, row["task"], row["test"], row["metric"], row["labels"]

    rivals = {
        key(row, row["mode"]): row
        for method, rows in methods.items()
        for row in rows
        if method != RANDOM and row["mode"] in YARDSTICKS
    }
    random = {key(row, row["mode"]): row for row in methods.get(RANDOM, ())}
    compared = []
    for method, title in titles.items():
        for row in methods.get(method, ()) if method != RANDOM else ():
            if row["mode"] not in PRETRAINED or not metric_of(row["metric"]).main:
                continue
            for rival in YARDSTICKS:
                other = (
                    random.get(key(row, row["mode"])) if rival == "random" else rivals.get(key(row, rival))
                )
                if other is not None:
                    own = measured(row, who(title, row["mode"]))
                    compared.append(compare(own, measured(other, YARDSTICKS[rival]), rival))
    return compared


def _over_seeds(same: Sequence[Comparison]) -> Comparison:
    if len(same) == 1:
        return same[0]
    mean, half = t_interval([one.difference for one in same])
    return dataclasses.replace(same[0], difference=mean, low=mean - half, high=mean + half)
