"""Downstream tasks of a cell: labelled scans of the hospitals in, one row per number out.

Trained on the labels of the hospitals that took part, stopped by their validation patients, tested on their
test patients ("seen") and on every patient of the hospitals held out ("held_out"), which is opened here once.
When settings are still being chosen (`patients: validation`), tested on the validation patients and nobody
else. All methods get the same labels, steps and heads.
What this file does not do: train or test (`downstream.py`).

Axes: b = scans.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch

from client.latent_set import LatentSet
from meduet_models.meduet import MeDUET
from simulations.benchmark_settings import Cell, Task
from simulations.downstream import DownstreamRow, DownstreamSettings, LabelledScans, Mode
from simulations.run import Simulation

Downstream = Callable[
    [MeDUET | None, LabelledScans, LabelledScans, Mapping[str, LabelledScans], DownstreamSettings, int],
    list[DownstreamRow],
]
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
    modes: tuple[Mode, ...] = ("frozen", "finetuned") if models else ("scratch", "unet")
    encoders: Sequence[MeDUET | None] = models or [None]
    rows: list[DownstreamRow] = []
    for task in cell.tasks:
        seen = {split: labelled(task, scans[:num_sites], [split]) for split in _SPLITS}
        tests = {"seen": seen[cell.patients]}
        if cell.patients == "test" and num_sites < len(scans):
            tests["held_out"] = labelled(task, scans[num_sites:], _SPLITS, first_site=num_sites)
        settings = DownstreamSettings(
            task=task.task,
            classes=task.classes,
            spacing_mm=simulation.plan.volumes.spacing_mm,
            label_shares=task.label_shares,
            modes=modes,
            steps=task.steps,
        )
        told = [
            row
            for model in encoders
            for row in evaluate(model, seen["train"], seen["validation"], tests, settings, seed)
        ]
        rows += mean_rows(told)
    return rows


def labelled(
    task: Task, sets: Sequence[LatentSet], splits: Sequence[str], first_site: int = 0
) -> LabelledScans:
    """Scans of these splits with what `task` predicts; scans without it are left out.

    Raises `ValueError` when none is left, or a covariate has a value that the task does not name.
    """
    latents, labels, targets, patients, sites = [], [], list[int](), list[str](), list[int]()
    for site, own in enumerate(sets, start=first_site):
        rows = [row for split in splits for row in own.indices(split) if _has_target(task, own, row)]
        if not rows:
            continue
        latents.append(own.latents(rows))
        if task.task == "segmentation":
            volumes = own.labels(rows)
            assert volumes is not None
            labels.append(volumes)
        else:
            targets += [_class(task, own, row) for row in rows]
        patients += [f"{site}/{own.patients[row]}" for row in rows]
        sites += [site] * len(rows)
    if not latents:
        raise ValueError(f"Expected scans with {task.target or 'labels'} in {', '.join(splits)}; got none.")
    return LabelledScans(
        torch.cat(latents),
        torch.cat(labels) if labels else None,
        torch.tensor(targets) if targets else None,
        tuple(patients),
        tuple(sites),
    )


def _has_target(task: Task, scans: LatentSet, row: int) -> bool:
    if task.task == "segmentation":
        return scans.has_label[row]
    return scans.covariates[row].get(task.target, "") != ""


def _class(task: Task, scans: LatentSet, row: int) -> int:
    value = str(scans.covariates[row][task.target])
    if value not in task.values:
        raise ValueError(f"Expected {task.target} to be {' or '.join(task.values)}; got {value!r}.")
    return task.values.index(value)


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
