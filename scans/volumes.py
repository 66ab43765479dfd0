"""Scan to volume: one file or DICOM series in, one oriented, windowed, resampled, cropped volume out.

The prepared grid is the one that MONAI's `Orientation("RAS")`, `Spacing` and `ResizeWithPadOrCrop` would give
(a test compares). The way there is a window with clipping and one resampling straight onto that grid
(`scans/resampling.py`), of the part of the scan that it needs: a whole body costs no more memory than
a head. The way back is `lay_back`.

Augmented views (`view > 0`) are not a separate step: a mirrored, turned, scaled view *is* another prepared
grid, so image and label move together and `lay_back` undoes it.

No anti-aliasing: downsampling samples, as `Spacing` does. What a scan is, and why a file is not one:
`scans/scans.py`.

Axes: x y z = voxels as stored; d h w = voxels of the prepared volume, towards right, anterior, superior.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int16, Shaped
from torch import Tensor

from scans.nifti import read_nifti
from scans.resampling import Mode, percentiles, resample, spaced_grid
from scans.scans import FourD, Reason, Scan, UnusableScan, accept, accept_label, file_kind
from scans.volume_plan import VolumePlan

__all__ = ["CORNERS", "Geometry", "Prepared", "Reason", "Scan", "UnusableScan", "View", "draw_view",
           "geometry_of", "intensity_range", "kept_share", "label_on", "lay_back", "prepare",
           "prepared_affine", "ras_spacing", "read_files", "read_label", "read_scan", "same_grid",
           "translation", "volume_on", "world"]  # fmt: skip

SAMPLED = 100_000
"""Voxels of a scan, about, from which the share within the crop is told."""
BACKGROUND_SHARE = 0.1
"""Share of exactly equal lowest voxels from which on they are background, not tissue."""
LARGEST_TURN_DEGREES = 8.0
LARGEST_SCALING = 0.08


def read_scan(path: Path, four_d: FourD = "first") -> Scan:
    """Read a NIfTI file, a DICOM file, or a folder that holds exactly one DICOM series.

    Raises `UnusableScan` with one of the closed set of reasons.
    """
    if not path.is_dir():
        return read_files([path], four_d)
    from scans.dicom import find_series

    members = sorted(p for p in path.iterdir() if p.is_file() and file_kind(p) == "dicom")
    series, left_over = find_series(members)
    if not series:
        raise UnusableScan(left_over[0].reason if left_over else Reason.NOT_A_SCAN)
    if len(series) > 1:
        raise UnusableScan(Reason.SEVERAL_SERIES, f"{len(series)} series")
    return read_files(series[0].files, four_d)


def read_files(files: Sequence[Path], four_d: FourD = "first") -> Scan:
    """Read one scan from its files: one NIfTI, or all files of a DICOM series. Raises `UnusableScan`."""
    dicom = len(files) > 1 or file_kind(files[0]) == "dicom"
    if dicom and files[0].name.lower().endswith((".nii", ".nii.gz")):
        raise UnusableScan(Reason.WRONG_EXTENSION, "dicom")
    if not dicom:
        return accept(*read_nifti(files[0], four_d))
    from scans.dicom import read_series  # pydicom takes a fifth of a second to import

    return accept(*read_series(files, four_d))


def read_label(path: Path, image: Scan | None = None) -> Scan:
    """Read a NIfTI label: integers that fit int16, may be constant. Raises `UnusableScan`.

    A label whose header says nothing of where it lies takes the place of `image` when it has as many voxels
    of the same size (`placed` says so).
    """
    array, affine, _, _ = read_nifti(path, "refuse", placeless=image is not None)
    if image is None or np.isfinite(affine).all():
        return accept_label(array, affine)
    edges_mm = np.linalg.norm(image.affine[:3, :3], axis=0)
    if array.shape != image.array.shape or not np.allclose(np.diag(affine)[:3], edges_mm, rtol=1e-2):
        raise UnusableScan(
            Reason.NO_ORIENTATION, "neither sform nor qform, and another grid than its image's"
        )
    return dataclasses.replace(accept_label(array, image.affine), placed=True)


def kept_share(scan: Scan, plan: VolumePlan) -> float:
    """Share of the voxels brighter than the scan's mean that lie within the plan's crop: how much of the
    patient a model sees. 1 where the crop holds the whole scan, or the plan's extent is the scan."""
    if plan.extent == "scan":
        return 1.0
    to_crop = np.linalg.inv(prepared_affine(scan, plan, View())) @ scan.affine
    sizes = np.array(scan.array.shape)
    corners = world(to_crop, CORNERS * (sizes - 1))
    limits = np.array(plan.shape)
    if corners.min() >= -0.5 and (corners <= limits - 0.5).all():
        return 1.0
    step = max(1, round((scan.array.size / SAMPLED) ** (1 / 3)))
    sample = scan.array[::step, ::step, ::step]
    bright = sample > sample.mean()
    if not bright.any():
        return 1.0
    x, y, z = (np.arange(side) * float(step) for side in sample.shape)
    inside = bright
    for row, limit in zip(to_crop[:3], limits, strict=True):
        place = (row[0] * x + row[3])[:, None, None] + (row[1] * y)[:, None] + row[2] * z
        inside = inside & (place >= -0.5) & (place < limit - 0.5)
    return np.count_nonzero(inside) / np.count_nonzero(bright)


def same_grid(scan: Scan, label: Scan, tolerance: float = 0.25) -> bool:
    """Whether two scans have the same voxels in space, in whatever order and direction they store them.

    `tolerance`: largest distance of corresponding corners, in edges of the smallest voxel.
    """
    corners = []
    for image in (scan, label):
        shape, affine = _ras_order(image.array.shape, image.affine)
        corners.append((shape, world(affine, CORNERS * (np.array(shape) - 1))))
    (shape, ours), (other_shape, theirs) = corners
    edge_mm = np.linalg.norm(scan.affine[:3, :3], axis=0).min()
    return shape == other_shape and bool(np.abs(ours - theirs).max() <= tolerance * edge_mm)


CORNERS = np.array(list(np.ndindex(2, 2, 2)))
"""Of a box, in units of its sides."""


def _ras_order(shape: Sequence[int], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of the same voxels, stored towards right, anterior, superior."""
    from nibabel.orientations import inv_ornt_aff, io_orientation  # imports all of nibabel

    to_ras = io_orientation(affine)
    turned = tuple(int(n) for n in np.array(shape)[np.argsort(to_ras[:, 0])])
    return turned, affine @ inv_ornt_aff(to_ras, shape)


def world(affine: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Places of these indices by an affine."""
    return np.asarray(indices @ affine[:3, :3].T + affine[:3, 3])


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a prepared volume lies in the patient, and the grid the patient's own scan had."""

    source_affine: Float64[np.ndarray, "4 4"]
    source_shape: tuple[int, int, int]
    prepared_affine: Float64[np.ndarray, "4 4"]
    prepared_shape: tuple[int, int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON; exact."""
        return {
            "source_affine": self.source_affine.tolist(),
            "source_shape": list(self.source_shape),
            "prepared_affine": self.prepared_affine.tolist(),
            "prepared_shape": list(self.prepared_shape),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Geometry":
        """The inverse of `to_dict`."""
        x, y, z = values["source_shape"]
        d, h, w = values["prepared_shape"]
        source, prepared = (np.array(values[f"{k}_affine"], np.float64) for k in ("source", "prepared"))
        return Geometry(source, (int(x), int(y), int(z)), prepared, (int(d), int(h), int(w)))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the tokenizer encodes."""

    volume: Float32[Tensor, "1 d h w"]
    """Intensities in [0, 1]; 0 outside the scan."""
    label: Int16[Tensor, "1 d h w"] | None
    """On the same grid; 0 outside the scan."""
    geometry: Geometry


@dataclass(frozen=True)
class View:
    """How a view differs from the scan: a small value, drawn once, applied deterministically."""

    mirrored: bool = False
    """Left and right exchanged."""
    turn_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """About the right, anterior and superior axis, in this order."""
    scaling: float = 1.0
    """Above 1, the anatomy looks smaller."""


def draw_view(scan_id: str, view: int) -> View:
    """The `view`-th view of a scan: 0 is the scan itself; the others are drawn from (scan id, view) alone."""
    if view == 0:
        return View()
    digest = hashlib.sha256(f"{scan_id}/{view}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    mirrored = bool(generator.integers(2))
    x, y, z = generator.uniform(-LARGEST_TURN_DEGREES, LARGEST_TURN_DEGREES, 3)
    scaling = 1.0 + float(generator.uniform(-LARGEST_SCALING, LARGEST_SCALING))
    return View(mirrored, (float(x), float(y), float(z)), scaling)


def prepare(scan: Scan, plan: VolumePlan, view: int = 0, label: Scan | None = None) -> Prepared:
    """Orient to RAS, window to [0, 1], resample to `plan.spacing_mm`, crop or pad to `plan.shape` about the
    centre.

    Linear interpolation for the scan, nearest for the label, both by world coordinates: shear is resampled
    away, an oblique scan keeps its rotation (its axes become the nearest of right, anterior, superior).
    """
    affine = prepared_affine(scan, plan, draw_view(scan.scan_id, view))
    volume = volume_on(scan, intensity_range(scan.array, plan), affine, plan.shape)
    placed = None if label is None else label_on(label, affine, plan.shape)
    return Prepared(volume, placed, geometry_of(scan, affine, plan.shape))


def volume_on(
    scan: Scan, intensities: tuple[float, float], affine: np.ndarray, shape: tuple[int, int, int]
) -> Float32[Tensor, "1 d h w"]:
    """A scan on the grid of this affine and shape, linear; `intensities` become [0, 1], 0 outside of it."""
    low, high = intensities
    part, placed = _part(scan, affine, shape)
    windowed = torch.from_numpy(part).sub(low).div_(high - low).clamp_(0.0, 1.0)
    return resample(windowed, placed, affine, shape, "bilinear")[None].clamp_(0.0, 1.0)


def label_on(label: Scan, affine: np.ndarray, shape: tuple[int, int, int]) -> Int16[Tensor, "1 d h w"]:
    """A label on the grid of this affine and shape, nearest; 0 outside of it."""
    part, placed = _part(label, affine, shape)
    on_grid = resample(torch.from_numpy(part), placed, affine, shape, "nearest")
    return on_grid[None].round().to(torch.int16)


def geometry_of(scan: Scan, affine: np.ndarray, shape: tuple[int, int, int]) -> Geometry:
    """Where a volume of this affine and shape, made of `scan`, lies."""
    x, y, z = scan.array.shape
    return Geometry(scan.affine, (x, y, z), affine, shape)


def intensity_range(array: Float32[np.ndarray, "x y z"], plan: VolumePlan) -> tuple[float, float]:
    """The values that become 0 and 1.

    `ct_hu`, `fixed`: the plan's window. `mr_percentiles`: the plan's percentiles over all voxels of the scan,
    without its background when it has one: the exact value (the minimum, or zero) that fills at least a tenth
    of the scan, as masked air does. Air that was measured has noise, no exact value, and counts; so does
    everything in a crop without background. If the percentiles coincide (a few bright voxels on nothing),
    minimum and maximum are taken.
    """
    if plan.window != "mr_percentiles":
        return plan.ct_window_hu if plan.window == "ct_hu" else plan.fixed_window
    background, ties = max(
        ((value, int(np.count_nonzero(array == value))) for value in (array.min(), np.float32(0.0))),
        key=lambda pair: pair[1],
    )
    kept = array[array != background] if ties >= BACKGROUND_SHARE * array.size else array
    low, high = percentiles(kept, plan.mr_percentiles)
    if not low < high:
        low, high = array.min(), array.max()
    return float(low), float(high)


def prepared_affine(scan: Scan, plan: VolumePlan, view: View) -> Float64[np.ndarray, "4 4"]:
    """Prepared voxel indices to world: the grid of `Spacing` then `ResizeWithPadOrCrop`, seen by `view`."""
    spacing_mm = [float(edge) for edge in plan.spacing_mm]
    spaced_shape, spaced = spaced_grid(*_ras_order(scan.array.shape, scan.affine), spacing_mm)
    start = [
        int(there) // 2 - wanted // 2 if there >= wanted else -((wanted - int(there)) // 2)
        for there, wanted in zip(spaced_shape, plan.shape, strict=True)
    ]
    grid = spaced @ translation(np.array(start))
    if view == View():
        return np.asarray(grid)
    a, b, c = (math.radians(angle) for angle in view.turn_degrees)
    turn_x = [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]]
    turn_y = [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
    turn_z = [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]]
    moved = np.eye(4)
    moved[:3, :3] = np.array(turn_z) @ turn_y @ turn_x @ np.diag([-1.0 if view.mirrored else 1.0, 1.0, 1.0])
    moved[:3, :3] *= view.scaling
    centre = (np.array(plan.shape) - 1) / 2
    to_mm = np.diag([*plan.spacing_mm, 1.0])  # turn in millimetres, not in voxels
    about = np.linalg.inv(to_mm) @ moved @ to_mm
    return np.asarray(grid @ translation(centre) @ about @ translation(-centre))


def ras_spacing(geometry: Geometry) -> Float32[np.ndarray, "3"]:
    """Millimetres between voxels of the scan as it was stored, right, anterior, superior.

    An oblique scan's axes count as those they are nearest to.
    """
    from nibabel.orientations import io_orientation  # imports all of nibabel

    edges_mm = np.linalg.norm(geometry.source_affine[:3, :3], axis=0)
    nearest = io_orientation(geometry.source_affine)[:, 0].astype(int)
    return np.asarray(edges_mm[np.argsort(nearest)], np.float32)


def translation(by: np.ndarray) -> np.ndarray:
    """The affine that moves by so many voxels."""
    matrix = np.eye(4)
    matrix[:3, 3] = by
    return matrix


def _part(
    scan: Scan, affine: np.ndarray, shape: Sequence[int]
) -> tuple[Float32[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """The part of a scan that lies within the grid of this affine and shape, and one voxel around it; with
    its own affine."""
    corners = world(np.linalg.inv(scan.affine) @ affine, CORNERS * (np.array(shape) - 1))
    sizes = np.array(scan.array.shape)
    first = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, sizes - 1)
    last = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, first, sizes - 1)
    part = scan.array[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))]
    return part, scan.affine @ translation(first)


def lay_back(
    volume: Shaped[Tensor, "1 d h w"], geometry: Geometry
) -> tuple[Shaped[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """A prepared volume, or anything predicted on its grid, on the patient's own grid; with that grid's
    affine.

    Floating values are interpolated linearly, integers by nearest neighbour (same dtype back). Voxels outside
    the prepared crop are 0.
    """
    if tuple(volume.shape[1:]) != geometry.prepared_shape:
        raise ValueError(f"Expected a volume of {geometry.prepared_shape}; got {tuple(volume.shape[1:])}.")
    mode: Mode = "bilinear" if volume.is_floating_point() else "nearest"
    image = volume.detach().to("cpu", torch.float32)[0]
    placed = resample(image, geometry.prepared_affine, geometry.source_affine, geometry.source_shape, mode)
    if mode == "nearest":
        placed = placed.round()
    return placed.to(volume.dtype).numpy(), geometry.source_affine
