"""The arithmetic of grids: where a resampled volume lies, its voxels, and the percentiles of its intensities.

What MONAI's `Spacing` and `SpatialResample` compute, to the bit (tests compare), without importing MONAI,
which takes fifty times as long as resampling a head. Where two grids coincide voxel by voxel, whatever the
order and direction of their axes, voxels are copied instead of interpolated.

Does not do: decide what is resampled onto which grid (`scans/volumes.py`).

Axes: x y z = voxels of the given array, d h w = voxels of the grid asked for.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor, nn

Mode = Literal["bilinear", "nearest"]
CLOSE = 1e-3
"""How far two grids of one shape may be apart and count as one, as MONAI has it (`AFFINE_TOL`)."""
EXACT = 1e-12
"""How far a map between voxels may be from whole numbers to be taken as such: rounding of float64."""
FAINT = 1e-4
"""Share of the largest value below which the rounding of places may show in a value that is copied."""
SAMPLED_EVERY = 64
"""Of how many values one is in the sample that tells about where a percentile lies."""


def spaced_grid(
    shape: Sequence[int], affine: Float64[np.ndarray, "4 4"], spacing_mm: Sequence[float]
) -> tuple[tuple[int, ...], Float64[np.ndarray, "4 4"]]:
    """Shape and affine of the grid with this spacing that holds all voxels of a given one.

    Shear is removed, rotation kept. Raises `numpy.linalg.LinAlgError` for a singular affine.
    """
    zoom = np.linalg.cholesky(affine[:3, :3].T @ affine[:3, :3]).T
    spaced = np.eye(4)
    spaced[:3, :3] = affine[:3, :3] @ np.linalg.inv(zoom) @ np.diag(np.sign(np.diag(zoom)) * spacing_mm)
    ends = [(0.0, side - 1.0) for side in shape]
    corners = np.asarray(np.meshgrid(*ends, indexing="ij")).reshape((3, -1))
    corners = np.concatenate((corners, np.ones_like(corners[:1])))
    there = (np.linalg.solve(spaced, affine) @ corners)[:3]
    sides = np.round(np.ptp(there, axis=1) + 1.0).astype(int)
    for number in range(corners.shape[1]):
        if np.allclose((there - there[:, number : number + 1]).min(axis=1), 0.0, rtol=CLOSE):
            spaced[:3, 3] = (affine @ corners)[:3, number]  # the corner from which the grid begins
            return tuple(int(side) for side in sides), spaced
    middle = affine[:3, :3] @ (np.array(shape, float) / 2.0) + affine[:3, 3]
    spaced[:3, 3] = middle - spaced[:3, :3] @ (sides / 2.0)
    return tuple(int(side) for side in sides), spaced


def resample(
    array: Float32[Tensor, "x y z"],
    affine: Float64[np.ndarray, "4 4"],
    wanted: Float64[np.ndarray, "4 4"],
    shape: Sequence[int],
    mode: Mode,
) -> Float32[Tensor, "d h w"]:
    """`array`, which lies at `affine`, on the grid of affine `wanted` and `shape`; 0 outside of it."""
    to_voxels = np.linalg.solve(affine, wanted)
    if tuple(array.shape) == tuple(shape) and (
        np.allclose(affine, wanted, atol=CLOSE) or np.allclose(to_voxels, np.eye(4), atol=CLOSE)
    ):
        return array.clone()
    ahead = _normalised(array.shape) @ torch.from_numpy(to_voxels)
    theta = ahead @ torch.from_numpy(np.linalg.inv(_normalised(shape).numpy()))
    order = torch.tensor([2, 1, 0, 3])  # grid_sample counts axes backwards
    theta = theta[order][:, order][None, :3]
    copied = _copied(array, to_voxels, shape)
    if copied is None:
        grid = nn.functional.affine_grid(theta, [1, 1, *shape], align_corners=False)
        return _sampled(array, grid, mode)[0, 0].to(torch.float32)
    if mode == "bilinear" and len(faint := _faint(array, to_voxels, shape)):
        values = _sampled(array, _grid_at(faint, theta, shape), mode)
        copied.view(-1)[faint] = values.view(-1).to(torch.float32)
    return copied


def _sampled(array: Tensor, grid: Tensor, mode: Mode) -> Float64[Tensor, "1 1 d h w"]:
    source = array.to(torch.float64)[None, None]
    return nn.functional.grid_sample(source, grid, mode, padding_mode="zeros", align_corners=False)


def _grid_at(
    indices: Int64[Tensor, " k"], theta: Float64[Tensor, "1 3 4"], shape: Sequence[int]
) -> Float64[Tensor, "1 1 1 k 3"]:
    """The rows of `affine_grid` for these voxels, counted as in memory."""
    d, h, w = (torch.linspace(-1, 1, side, dtype=torch.float64) * (side - 1) / side for side in shape)
    _, height, width = shape
    places = (w[indices % width], h[indices // width % height], d[indices // (width * height)])
    base = torch.stack((*places, torch.ones(len(indices), dtype=torch.float64)), dim=1)
    return torch.bmm(base[None], theta.transpose(1, 2))[None, None]


def _faint(array: Tensor, to_voxels: np.ndarray, shape: Sequence[int]) -> Int64[Tensor, " k"]:
    """Voxels asked for that are about 0 beside one that is not: there, what interpolation at whole numbers
    gives in float64 (1e-14 of the neighbour, as they are whole but for rounding) is seen in float32."""
    padded = nn.functional.pad(array, (1,) * 6)
    bright = padded != 0
    beside = bright
    for axis in range(3):
        side = bright.shape[axis]
        ahead, behind = beside.narrow(axis, 1, side - 1), beside.narrow(axis, 0, side - 1)
        beside = beside.clone()
        beside.narrow(axis, 0, side - 1).logical_or_(ahead)
        beside.narrow(axis, 1, side - 1).logical_or_(behind)
    beside &= padded.abs() < FAINT * float(array.abs().max())
    shifted = to_voxels.copy()
    shifted[:3, 3] += 1
    there = _copied(beside, shifted, shape)
    assert there is not None
    return there.view(-1).nonzero()[:, 0]


def _normalised(shape: Sequence[int]) -> Float64[Tensor, "4 4"]:
    """From voxels to [-1, 1], whose ends are the outer faces of the outer voxels."""
    sides = torch.tensor(list(shape), dtype=torch.float64)
    scale = torch.diag(torch.cat((2.0 / sides, torch.ones(1, dtype=torch.float64))))
    scale[:-1, -1] = 1.0 / sides - 1.0
    return scale


def _copied(array: Tensor, to_voxels: np.ndarray, shape: Sequence[int]) -> Tensor | None:
    """The voxels themselves, where each voxel asked for is one of the array's or outside; else None."""
    turn = np.rint(to_voxels[:3, :3]).astype(int)
    start = np.rint(to_voxels[:3, 3]).astype(int)
    reach = 1.0 + np.abs(to_voxels[:3, 3]).max() + max(shape)
    ordered = (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all()
    if not ordered or np.abs(to_voxels[:3] - np.column_stack((turn, start))).max() > EXACT * reach:
        return None
    axes = np.abs(turn).argmax(axis=0)  # for each axis asked for, the array's
    turned = array.permute(*axes.tolist())
    placed = torch.zeros(*shape, dtype=array.dtype)
    source: list[slice] = []
    target: list[slice] = []
    backwards: list[int] = []
    for axis, (own, side) in enumerate(zip(axes.tolist(), shape, strict=True)):
        step, begin, length = int(turn[own, axis]), int(start[own]), array.shape[own]
        # voxel i asked for is voxel begin + step * i of the array
        first, last = (-begin, length - 1 - begin) if step > 0 else (begin - (length - 1), begin)
        first, last = max(first, 0), min(last, side - 1)
        if first > last:
            return placed
        there = sorted((begin + step * first, begin + step * last))
        target.append(slice(first, last + 1))
        source.append(slice(there[0], there[1] + 1))
        if step < 0:
            backwards.append(axis)
    placed[tuple(target)] = turned[tuple(source)].flip(backwards)
    return placed


def percentiles(values: Float32[np.ndarray, "..."], wanted: tuple[float, float]) -> tuple[float, float]:
    """`numpy.percentile` of finite values for two percentages, the same numbers to the bit.

    An even sample says about where they lie, and only what is beyond is sorted: a fifth of the time.
    """
    flat = values.reshape(-1)
    sample = np.sort(flat[::SAMPLED_EVERY])
    low, high = (_quantile(flat, sample, percent / 100) for percent in wanted)
    return low, high


def _quantile(flat: np.ndarray, sample: np.ndarray, share: float) -> float:
    virtual = (flat.size - 1) * share
    rank = min(int(virtual), flat.size - 1)
    before, after = _of_ranks(flat, sample, rank, min(rank + 1, flat.size - 1))
    between, apart = virtual - rank, np.float64(after - before)  # apart: rounded to float32, as numpy does
    if between >= 0.5:
        return float(np.float64(after) - apart * (1 - between))
    return float(np.float64(before) + apart * between)


def _of_ranks(
    flat: np.ndarray, sample: np.ndarray, rank: int, following: int
) -> tuple[np.float32, np.float32]:
    """The values of these two ranks, counted from 0, of all values in ascending order."""
    expected, margin = rank * len(sample) // flat.size, 32 + len(sample) // 256
    if rank < flat.size // 2:
        tail = flat[flat <= sample[min(expected + margin, len(sample) - 1)]]
        skipped = 0
    else:
        tail = flat[flat >= sample[max(expected - margin, 0)]]
        skipped = flat.size - tail.size
    if skipped > rank or tail.size + skipped <= following:  # the sample misled
        tail, skipped = flat, 0
    ordered = np.partition(tail, [rank - skipped, following - skipped])
    return ordered[rank - skipped], ordered[following - skipped]
