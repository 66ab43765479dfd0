"""Scan to whole volume (`volumes.extent: scan`): the box around the foreground of the resampled scan.

The grid is that of a crop (`scans/volumes.py`), continued over the scan; its cells are blocks of the
tokenizer's stride, the same blocks as the central crop's, so that one voxel is in one place of one cell
whatever the extent. Foreground is what is brighter than a tenth of the window; a cell is foreground when at
least half of it is. The box holds every such cell, one cell more on each side where the scan has one, and is
nowhere smaller than `volumes.shape`: where the patient is, the rest is background as the scan has it, and
zeros beyond the scan.

The scan is resampled slab by slab: beside it, there is one float32 volume of the resampled grid and a slab.

Axes: d h w = voxels of the volume, i j k = cells of it.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int16, Shaped
from torch import Tensor

from scans.scans import MAXIMUM_VOXELS, Reason, Scan, UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import (
    CORNERS,
    Geometry,
    Prepared,
    draw_view,
    geometry_of,
    intensity_range,
    label_on,
    lay_back,
    prepared_affine,
    translation,
    volume_on,
    world,
)

FOREGROUND = 0.1
"""Intensity, of [0, 1], above which a voxel is foreground: with -175 to 250 HU, above -132 HU."""
FOREGROUND_OF_CELL = 0.5
"""Share of foreground voxels from which on a cell is foreground: single bright voxels of noise are none."""
SLAB_VOXELS = 2**20
"""Voxels that are resampled at once, about; resampling takes some 60 bytes of each."""


@dataclass(frozen=True, eq=False)
class WholeVolume(Prepared):
    """The box around a scan's foreground."""

    foreground: Bool[Tensor, "i j k"]
    """Which cells are foreground."""


def prepare_whole(
    scan: Scan, plan: VolumePlan, stride: int, view: int = 0, label: Scan | None = None
) -> WholeVolume:
    """As `scans.volumes.prepare`, but all of the foreground; `stride`: edge of a cell, in voxels.

    Raises `UnusableScan` when there is no foreground, and for a grid beyond `MAXIMUM_VOXELS`.
    """
    affine, shape = _grid(scan, plan, stride, view)
    if math.prod(shape) > MAXIMUM_VOXELS:
        raise UnusableScan(
            Reason.TOO_LARGE, f"{math.prod(shape)} voxels as resampled, at most {MAXIMUM_VOXELS}"
        )
    intensities = intensity_range(scan.array, plan)
    volume = torch.empty(1, *shape)
    foreground = torch.empty([side // stride for side in shape], dtype=torch.bool)
    for first, slab_affine, slab in _slabs(affine, shape, stride):
        made = volume_on(scan, intensities, slab_affine, slab)
        volume[:, first : first + slab[0]] = made
        foreground[first // stride : (first + slab[0]) // stride] = foreground_cells(made, stride)
    if not bool(foreground.any()):
        raise UnusableScan(Reason.NO_FOREGROUND)
    start, cells = _box(foreground, [side // stride for side in plan.shape])
    inside = tuple(slice(a, a + n) for a, n in zip(start, cells, strict=True))
    voxels = tuple(slice(a * stride, (a + n) * stride) for a, n in zip(start, cells, strict=True))
    d, h, w = (n * stride for n in cells)
    box = affine @ translation(np.array(start) * stride)
    return WholeVolume(
        volume=volume[:, *voxels],  # a view: a copy would be a second volume
        label=None if label is None else _whole_label(label, box, (d, h, w), stride),
        geometry=geometry_of(scan, box, (d, h, w)),
        foreground=foreground[inside].clone(),
    )


def volume_at(scan: Scan, plan: VolumePlan, geometry: Geometry) -> Float32[Tensor, "1 d h w"]:
    """A scan's volume on the grid of `geometry`: what was encoded there, to the bit for a crop."""
    return volume_on(
        scan, intensity_range(scan.array, plan), geometry.prepared_affine, geometry.prepared_shape
    )


def lay_back_whole(
    volume: Shaped[Tensor, "1 d h w"], geometry: Geometry
) -> tuple[Shaped[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """As `scans.volumes.lay_back`, slab by slab of the patient's grid."""
    source = geometry.source_affine
    laid: list[np.ndarray] = []
    for _, affine, slab in _slabs(source, geometry.source_shape, 1):
        there = dataclasses.replace(geometry, source_affine=affine, source_shape=slab)
        corners = world(np.linalg.inv(geometry.prepared_affine) @ affine, CORNERS * (np.array(slab) - 1))
        limits = np.array(geometry.prepared_shape) - 1
        start = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, limits)
        last = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, start, limits)
        (a, b, c), (d, h, w) = (tuple(map(int, these)) for these in (start, last - start + 1))
        part = volume[:, a : a + d, b : b + h, c : c + w]
        laid.append(lay_back(part, part_of(there, (a, b, c), (d, h, w)))[0])
    return np.concatenate(laid), source


def part_of(geometry: Geometry, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Geometry:
    """Where a part of a volume lies: `shape` voxels from `start`."""
    affine = geometry.prepared_affine @ translation(np.array(start))
    return dataclasses.replace(geometry, prepared_affine=affine, prepared_shape=shape)


def foreground_cells(volume: Float32[Tensor, "1 d h w"], stride: int) -> Bool[Tensor, "i j k"]:
    """Which cells of a volume in [0, 1] are foreground."""
    d, h, w = (side // stride for side in volume.shape[1:])
    blocks = (volume[0] > FOREGROUND).reshape(d, stride, h, stride, w, stride)
    return blocks.sum((1, 3, 5)) >= FOREGROUND_OF_CELL * stride**3


def _grid(scan: Scan, plan: VolumePlan, stride: int, view: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The grid that holds scan and central crop, in whole cells of that crop."""
    affine = prepared_affine(scan, plan, draw_view(scan.scan_id, view))
    corners = world(np.linalg.inv(affine) @ scan.affine, CORNERS * (np.array(scan.array.shape) - 1))
    first = np.minimum(np.rint(corners.min(axis=0)), 0) // stride * stride
    last = np.maximum(np.rint(corners.max(axis=0)) + 1, plan.shape)
    d, h, w = (int(n) for n in -(-(last - first) // stride) * stride)
    return affine @ translation(first), (d, h, w)


def _slabs(
    affine: np.ndarray, shape: tuple[int, int, int], stride: int
) -> Iterator[tuple[int, np.ndarray, tuple[int, int, int]]]:
    """First row, affine and shape of slabs of whole cells along the first axis."""
    depth = max(1, SLAB_VOXELS // (shape[1] * shape[2] * stride)) * stride
    for first in range(0, shape[0], depth):
        slab = (min(depth, shape[0] - first), shape[1], shape[2])
        yield first, affine @ translation(np.array([first, 0, 0])), slab


def _box(foreground: Bool[Tensor, "i j k"], least: list[int]) -> tuple[list[int], list[int]]:
    """First cell and sides of the box: the foreground, a cell around it, and `least` cells per axis."""
    start, sides = [], []
    for axis, wanted in enumerate(least):
        cells = foreground.shape[axis]
        others = tuple(other for other in range(3) if other != axis)
        places = foreground.any(dim=others[1]).any(dim=others[0]).nonzero()[:, 0]
        first, last = max(0, int(places[0]) - 1), min(cells - 1, int(places[-1]) + 1)
        side = max(last - first + 1, wanted)
        first -= (side - (last - first + 1)) // 2
        start.append(min(max(0, first), cells - side))
        sides.append(side)
    return start, sides


def _whole_label(
    label: Scan, affine: np.ndarray, shape: tuple[int, int, int], stride: int
) -> Int16[Tensor, "1 d h w"]:
    placed = torch.empty(1, *shape, dtype=torch.int16)
    for first, slab_affine, slab in _slabs(affine, shape, stride):
        placed[:, first : first + slab[0]] = label_on(label, slab_affine, slab)
    return placed
