"""What a predictor is worth on scans, in a task's own metrics: a value per scan, or a number of all of them.

Crops are measured on their grid. Of a whole scan (`volumes.extent: scan`) a label map is laid back on the
patient's own grid and compared there with the label as its file has it, what was never encoded included: the
numbers are those that whoever opens the two files would find.
What this file does not do: bring scans to patients, or draw intervals (`metrics.py`).

Axes: x y z = voxels as the scan stores them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from client.latents.labelled import LabelledScans
from client.products.segmentation import laid_back
from meduet_models.downstream.task import Floats, Grid, Statistic
from meduet_models.downstream.tasks import task_of
from simulations.downstream.learning import Predictor
from simulations.downstream.settings import DownstreamSettings


@dataclass(frozen=True)
class Measured:
    """Values by metric."""

    main: Mapping[str, Floats | Statistic]
    """Of the main metric."""
    others: Mapping[str, Floats | Statistic]
    """Of the others, where they were asked for."""


def measured(
    predictor: Predictor, scans: LabelledScans, settings: DownstreamSettings, *, everything: bool
) -> Measured:
    """The main metric of a predictor on scans; with `everything`, the others too."""
    if not scans.by_voxel:
        grid = Grid(spacing_mm=settings.spacing_mm, tolerance_mm=settings.tolerance_mm)
        return _measured(predictor(scans), scans.answers, settings, grid, everything)
    each = [_of_whole(predictor, scans.rows([row]), settings, everything) for row in range(len(scans))]
    return Measured(_side_by_side([own.main for own in each]), _side_by_side([own.others for own in each]))


def _of_whole(
    predictor: Predictor, scan: LabelledScans, settings: DownstreamSettings, everything: bool
) -> Measured:
    whole = scan.by_voxel[0]
    labels, affine = laid_back(predictor(scan)[0], whole.geometry)
    predicted, truth = _around_what_is_labelled(
        torch.from_numpy(labels)[None].long(), whole.classes_as_stored()
    )
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    outputs = F.one_hot(predicted, settings.classes).movedim(-1, 1).float()  # 1 classes x y z
    grid = Grid(spacing_mm=(x, y, z), tolerance_mm=settings.tolerance_mm)
    return _measured(outputs, truth[None], settings, grid, everything)


def _measured(
    outputs: Tensor, answers: Tensor, settings: DownstreamSettings, grid: Grid, everything: bool
) -> Measured:
    task = task_of(settings.task)
    main = task.measure_main(outputs, answers, settings.target, grid)
    if not everything:
        return Measured(main, {})
    of_all = task.measure(outputs, answers, settings.target, grid)
    return Measured(main, {name: own for name, own in of_all.items() if name not in main})


def _around_what_is_labelled(
    predicted: Int[Tensor, "1 x y z"], truth: Int[Tensor, "1 x y z"]
) -> tuple[Tensor, Tensor]:
    """Both, without the background far from any label: no overlap and no distance depends on it."""
    labelled = ((predicted > 0) | (truth > 0))[0]
    inside = []
    for axis, side in enumerate(labelled.shape):
        others = [other for other in range(3) if other != axis]
        found = labelled.any(dim=others[1]).any(dim=others[0]).nonzero()[:, 0].tolist() or [0]
        inside.append(slice(max(0, found[0] - 1), min(side, found[-1] + 2)))
    return predicted[:, *inside], truth[:, *inside]


def _side_by_side(of_scans: Sequence[Mapping[str, Floats | Statistic]]) -> dict[str, Floats | Statistic]:
    names = of_scans[0]
    return {name: np.concatenate([np.asarray(own[name]) for own in of_scans]) for name in names}
