"""Downstream tasks of a cell: labelled scans of the hospitals in, one row per number out.

Trained on the labels of the hospitals that took part, stopped by their validation patients, tested on their
test patients ("seen") and on every patient of the hospitals held out ("held_out"), which is opened here once.
When settings are still being chosen (`patients: validation`), tested on the validation patients and nobody
else. All methods get the same labels, steps and heads.
A method's encoder is read frozen, in closed form, and fine-tuned; the cell without one has the yardsticks.
What this file does not do: train or test (`simulations/downstream/`).

Axes: b = scans.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Protocol

from client.latents.labelled import LabelledScans, NoLabels
from client.latents.latent_set import LatentSet
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.downstream.task import Target
from meduet_models.meduet import MeDUET
from scans.volume_plan import VolumePlan
from simulations.benchmark.settings import Cell, Task
from simulations.downstream.evaluate import (
    DownstreamRow,
    DownstreamSettings,
    Evaluated,
    Groups,
    Mode,
)
from simulations.downstream.fairness import groups_of
from simulations.hospitals.labelled import Part, known_answers, known_covariates
from simulations.run import Simulation

_OF_A_MODEL: tuple[Mode, ...] = ("frozen", "finetuned")
_WITHOUT: tuple[Mode, ...] = ("label_map", "ridge", "ridge_neighbours", "scratch", "unet", "unet_volume")
_SPLITS = ("train", "validation", "test")
_RESAMPLES = 400


class Downstream(Protocol):
    """Trains and tests the downstream tasks (`simulations/downstream/evaluate.py`)."""

    def __call__(
        self,
        model: MeDUET | None,
        train: LabelledScans,
        validation: LabelledScans,
        tests: Mapping[str, LabelledScans],
        settings: DownstreamSettings,
        seed: int,
        *,
        groups: Groups | None = None,
    ) -> Evaluated:
        """Every mode at every number of labels, on every test set."""


def downstream_rows(
    cell: Cell,
    simulation: Simulation,
    scans: Sequence[LatentSet],
    models: Sequence[MeDUET],
    evaluate: Downstream,
) -> Evaluated:
    """Rows of every task; the mean over `models` where sites have different ones, and without any the
    yardsticks that need none. The FairnessScore is that of the first model.
    """
    num_sites, seed = len(simulation.plan.sites), simulation.plan.seed
    modes = _OF_A_MODEL if models else _WITHOUT
    volumes = simulation.plan.volumes if "unet_volume" in modes else None
    encoders: Sequence[MeDUET | None] = models or [None]
    of_cell = Evaluated([], [])
    for task in cell.tasks:
        settings = DownstreamSettings(
            task=task.task,
            classes=task.classes,
            target=Target(task.target, task.values),
            spacing_mm=simulation.plan.volumes.spacing_mm,
            crop_foreground=simulation.plan.volumes.crop_foreground,
            label_counts=task.label_counts,
            label_shares=task.label_shares,
            draws=task.draws,
            trained_draws=task.trained_draws,
            modes=modes,
            plan_seed=seed,
            steps=task.steps,
            bootstrap=_RESAMPLES,
            network=None if models else simulation.plan.network,
        )
        local = settings.local
        parts = {split: _parts(scans[:num_sites], [split]) for split in _SPLITS}
        tested = {"seen": parts[cell.patients]}
        if cell.patients == "test" and num_sites < len(scans):
            tested["held_out"] = _parts(scans[num_sites:], _SPLITS, num_sites)
        sets = {name: labelled(task, local, own, volumes) for name, own in (parts | tested).items()}
        groups = {
            name: groups_of(known_covariates(own, local, task.target, task.values))
            for name, own in tested.items()
        }
        tests = {name: sets[name] for name in tested}
        evaluated = [
            evaluate(model, sets["train"], sets["validation"], tests, settings, seed, groups=groups)
            for model in encoders
        ]
        of_cell.rows.extend(mean_rows([row for one in evaluated for row in one.rows]))
        of_cell.fairness.extend(evaluated[0].fairness)
    return of_cell


def labelled(
    task: Task, local: LocalFinetuning, parts: Sequence[Part], volumes: VolumePlan | None
) -> LabelledScans:
    """Scans with what `task` predicts, patients named `<hospital>/<patient>`; scans without it are left out.
    Raises `NoLabels` when none is left.
    """
    found = known_answers(parts, local, task.target, task.values, volumes)
    if found is None:
        raise NoLabels(f"Expected scans with {task.target or 'labels'}; got none.")
    return found


def _parts(sets: Sequence[LatentSet], splits: Sequence[str], first: int = 0) -> list[Part]:
    return [
        (str(first + place), own, [row for split in splits for row in own.indices(split)])
        for place, own in enumerate(sets)
    ]


def mean_rows(rows: Sequence[DownstreamRow]) -> list[DownstreamRow]:
    """One row for each (task, mode, label share, test, metric): value and interval averaged.

    A value that is not a number (no surface to measure, say) is no value and is left out.
    """

    def what(row: DownstreamRow) -> tuple[str, str, str, str, str]:
        return row.task, row.mode, row.labels, row.test, row.metric

    means = []
    for _, same in groupby(sorted(rows, key=what), key=what):
        known = [row for row in same if all(map(math.isfinite, (row.value, row.low, row.high)))]
        if known:
            names = ("value", "low", "high", "first_value")
            mean = {name: sum(getattr(row, name) for row in known) / len(known) for name in names}
            several = [row.resamples for row in known], [row.first_resamples for row in known]
            means.append(
                dataclasses.replace(
                    known[0], **mean, resamples=_means(several[0]), first_resamples=_means(several[1])
                )
            )
    return means


def _means(several: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Mean of each place, in five digits, which is what a file needs."""
    return tuple(round(sum(own) / len(own), 5) for own in zip(*several, strict=True))
