"""Downstream tasks of a cell: labelled scans of the hospitals in, one row per number out.

Trained on the labels of the hospitals that took part, stopped by their validation patients, tested on their
test patients ("seen") and on every patient of the hospitals held out ("held_out"), which is opened here once.
When settings are still being chosen (`patients: validation`), tested on the validation patients and nobody
else. All methods get the same labels, steps and heads.
What this file does not do: train or test (`downstream.py`).

Axes: b = scans.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Literal

from client.latents.labelled import LabelledScans, NoLabels, join, labelled_scans
from client.latents.latent_set import LatentSet
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.downstream.task import Target
from meduet_models.meduet import MeDUET
from simulations.benchmark.settings import Cell, Task
from simulations.downstream.evaluate import DownstreamRow, DownstreamSettings
from simulations.run import Simulation

Downstream = Callable[
    [MeDUET | None, LabelledScans, LabelledScans, Mapping[str, LabelledScans], DownstreamSettings, int],
    list[DownstreamRow],
]
_Mode = Literal["frozen", "finetuned", "scratch", "unet"]
_SPLITS = ("train", "validation", "test")


def downstream_rows(
    cell: Cell,
    simulation: Simulation,
    scans: Sequence[LatentSet],
    models: Sequence[MeDUET],
    evaluate: Downstream,
) -> list[DownstreamRow]:
    """Rows of every task; the mean over `models` where sites have different ones, from scratch when none."""
    num_sites, seed = len(simulation.plan.sites), simulation.plan.seed
    modes: tuple[_Mode, ...] = ("frozen", "finetuned") if models else ("scratch", "unet")
    encoders: Sequence[MeDUET | None] = models or [None]
    rows: list[DownstreamRow] = []
    for task in cell.tasks:
        settings = DownstreamSettings(
            task=task.task,
            classes=task.classes,
            target=Target(task.target, task.values),
            spacing_mm=simulation.plan.volumes.spacing_mm,
            label_shares=task.label_shares,
            modes=modes,
            steps=task.steps,
            network=None if models else simulation.plan.network,
        )
        local = settings.local
        seen = {split: labelled(task, local, scans[:num_sites], [split]) for split in _SPLITS}
        tests = {"seen": seen[cell.patients]}
        if cell.patients == "test" and num_sites < len(scans):
            tests["held_out"] = labelled(task, local, scans[num_sites:], _SPLITS)
        measured = [
            row
            for model in encoders
            for row in evaluate(model, seen["train"], seen["validation"], tests, settings, seed)
        ]
        rows += mean_rows(measured)
    return rows


def labelled(
    task: Task, local: LocalFinetuning, sets: Sequence[LatentSet], splits: Sequence[str]
) -> LabelledScans:
    """Scans of these splits with what `task` predicts, patients named `<site>/<patient>`; scans without it
    are left out. Raises `NoLabels` when none is left.
    """
    parts = []
    for own in sets:
        rows = [row for split in splits for row in own.indices(split)]
        with contextlib.suppress(NoLabels):  # one hospital may have none; all of them may not
            part = labelled_scans(own, rows, local, task.target, task.values)
            named = tuple(f"{s}/{patient}" for s, patient in zip(part.site, part.patient, strict=True))
            parts.append(dataclasses.replace(part, patient=named))
    if not parts:
        raise NoLabels(f"Expected scans with {task.target or 'labels'} in {', '.join(splits)}; got none.")
    return join(parts)


def mean_rows(rows: Sequence[DownstreamRow]) -> list[DownstreamRow]:
    """One row for each (task, mode, label share, test, metric): value and interval averaged.

    A value that is not a number (no surface to measure, say) is no value and is left out.
    """

    def what(row: DownstreamRow) -> tuple[str, str, float, str, str]:
        return row.task, row.mode, row.label_share, row.test, row.metric

    means = []
    for _, same in groupby(sorted(rows, key=what), key=what):
        known = [row for row in same if all(map(math.isfinite, (row.value, row.low, row.high)))]
        if known:
            mean = {n: sum(getattr(r, n) for r in known) / len(known) for n in ("value", "low", "high")}
            means.append(dataclasses.replace(known[0], **mean))
    return means
