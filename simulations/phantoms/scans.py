"""Scans: a scanner applied to a patient's anatomy, or to an existing image, and the NIfTI file it writes.

The chain is the physical one: tissue signal times coil sensitivity, complex noise, k-space (limited
resolution, ringing, movement, slices), magnitude (hence Rician noise), contrast curve, intensity units.
Deterministic: what is random was drawn in `scanners.py`. World coordinates survive every oddity of the file.

Axes: c = tissues, x y z = voxels; x y z of the returned arrays run right, anterior, superior (before the
oblique rotation); only `write_scan` turns them into the stored orientation.
"""

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy import fft
from scipy.spatial.transform import Rotation

from simulations.phantoms.atlas import Volume, grid_affine, grid_shape
from simulations.phantoms.patients import TISSUES, Anatomy
from simulations.phantoms.scanners import COIL_ORDER, REFERENCE_VOXEL_MM, Acquisition, Scanner
from storage.files import OWNER

Affine = NDArray[np.float64]

_CURVE_PIVOT = 1.2
_NEUTRAL = (0.0, 0.22, 0.55, 0.8, 1.0)
"""Where fluid, grey matter, white matter and the brightest tissue lie in a robustly scaled T1 image."""


def field_of_view(
    scanner: Scanner, acquisition: Acquisition, resolution_mm: int
) -> tuple[Affine, tuple[int, int, int]]:
    """Grid on which `scanner` samples a head: voxel to world in mm [4 4], and voxels per axis."""
    shape, affine = grid_shape(resolution_mm), grid_affine(resolution_mm)
    angles = np.asarray(scanner.oblique_deg) + np.asarray(acquisition.tilt_deg)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    middle = affine[:3, :3] @ ((np.asarray(shape) - 1) / 2) + affine[:3, 3]
    placed = np.eye(4)
    placed[:3, :3] = turn @ affine[:3, :3]
    placed[:3, 3] = turn @ (affine[:3, 3] - middle) + middle + np.asarray(acquisition.shift_mm)
    return placed, shape


def render(anatomy: Anatomy, scanner: Scanner, acquisition: Acquisition) -> tuple[Volume, Affine]:
    """Scan `anatomy`: stored intensities, float32 [x y z], and their voxel to world.

    The grid is the anatomy's, with fewer voxels along the slice axis where slices are thicker.
    """
    signals = scanner.signals
    weights = np.array([signals[tissue] for tissue in TISSUES], np.float32)
    signal = np.tensordot(weights, anatomy.tissues, axes=1)
    signal += (1 - signals["gm"]) * anatomy.texture
    spacing = np.linalg.norm(anatomy.affine[:3, :3], axis=0)
    slices = slice_count(anatomy.tissues.shape[1:], spacing, scanner)
    magnitude = _acquire(np.maximum(signal, 0), spacing, slices, scanner, acquisition)
    return _units(_curve(magnitude, scanner), scanner, acquisition), sliced_affine(anatomy, scanner)


def slice_count(shape: tuple[int, ...], spacing_mm: NDArray[np.float64], scanner: Scanner) -> int:
    """Slices of `scanner.slice_mm` (never thinner than the grid) in the field of view."""
    axis = scanner.slice_axis
    thickness_mm = max(scanner.slice_mm, float(spacing_mm[axis]))
    return max(1, round(shape[axis] * float(spacing_mm[axis]) / thickness_mm))


def sliced_affine(anatomy: Anatomy, scanner: Scanner) -> Affine:
    """Voxel to world of the scan: the anatomy's, with the slice axis stretched about its first voxel."""
    axis = scanner.slice_axis
    shape = anatomy.tissues.shape[1:]
    count = slice_count(shape, np.linalg.norm(anatomy.affine[:3, :3], axis=0), scanner)
    affine = anatomy.affine.copy()
    affine[:3, axis] *= shape[axis] / count
    return affine


def slice_anatomy(anatomy: Anatomy, scanner: Scanner) -> Anatomy:
    """`anatomy` averaged over the thickness of the scan's slices, for labels on the scan's own grid."""
    axis = scanner.slice_axis
    shape = anatomy.tissues.shape[1:]
    count = slice_count(shape, np.linalg.norm(anatomy.affine[:3, :3], axis=0), scanner)
    affine = sliced_affine(anatomy, scanner)
    if count == shape[axis]:
        return anatomy
    thickness = shape[axis] / count  # in voxels of the anatomy
    middle, voxel = np.arange(count)[:, None] * thickness, np.arange(shape[axis])
    upper = np.minimum(middle + thickness / 2, voxel + 0.5)
    overlap = np.clip(upper - np.maximum(middle - thickness / 2, voxel - 0.5), 0, None)
    profile = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)  # slices, voxels
    tissues, texture = (
        np.moveaxis(np.tensordot(profile, values, axes=(1, values.ndim - 3 + axis)), 0, axis - 3)
        for values in (anatomy.tissues, anatomy.texture)
    )
    return Anatomy(tissues, texture, affine)


def scan_image(image: NDArray[Any], scanner: Scanner, acquisition: Acquisition) -> Volume:
    """Restyle an existing T1-like image [x y z] as if `scanner` had taken it; same grid, float32.

    Contrast is a monotone curve on the robustly scaled image (0.5 to 99.5 percent). Resolution is relative
    to the image's own voxels: a scanner of 3 mm on 2 mm phantoms blurs by one and a half voxels.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = (float(q) for q in np.percentile(values, (0.5, 99.5)))
    if not high > low:
        raise ValueError("Expected an image with more than one intensity; got a constant one.")
    signals = scanner.signals
    knots = np.maximum.accumulate([0.0, signals["csf"], signals["gm"], 1.0, 1.25]) + 1e-3 * np.arange(5)
    scaled = (values - low) / (high - low)
    signal = np.interp(scaled, _NEUTRAL, knots).astype(np.float32)
    signal += np.maximum(scaled - 1, 0).astype(np.float32)  # the brightest half percent keeps its order
    pads = [(min(8, n - 1),) * 2 for n in values.shape]  # k-space is periodic; crops are not
    inner = tuple(slice(p, p + n) for (p, _), n in zip(pads, values.shape, strict=True))
    padded = np.pad(signal, pads, mode="reflect")
    voxel = np.full(3, REFERENCE_VOXEL_MM)
    magnitude = _acquire(padded, voxel, padded.shape[scanner.slice_axis], scanner, acquisition)
    return _units(_curve(magnitude[inner], scanner), scanner, acquisition)


def coil_sensitivity(shape: tuple[int, ...], scanner: Scanner, acquisition: Acquisition) -> Volume:
    """Smooth positive sensitivity over the field of view, [x y z]: the scanner's pattern plus the scan's."""
    rng = np.random.default_rng(scanner.coil_seed)
    degrees = np.indices((COIL_ORDER,) * 3).sum(axis=0)
    pattern = rng.normal(size=degrees.shape) * (degrees < COIL_ORDER) / np.maximum(degrees, 1)
    pattern[0, 0, 0] = 0.0
    # Legendre polynomials are orthogonal on the box; this is the deviation of their sum.
    norms = np.array([1 / np.sqrt(2 * d + 1) for d in range(COIL_ORDER)])
    pattern *= scanner.coil_strength / np.linalg.norm(pattern * np.einsum("i,j,k->ijk", norms, norms, norms))
    for axis, jitter in enumerate(acquisition.coil_jitter):
        pattern[tuple(np.eye(3, dtype=int)[axis])] += jitter
    bx, by, bz = (legendre.legvander(np.linspace(-1, 1, n), COIL_ORDER - 1).astype(np.float32) for n in shape)
    log_sensitivity = np.einsum("ijk,xi,yj,zk->xyz", pattern.astype(np.float32), bx, by, bz, optimize=True)
    sensitivity: Volume = np.exp(log_sensitivity)
    return sensitivity


def _acquire(
    signal: Volume, spacing_mm: NDArray[np.float64], slices: int, scanner: Scanner, acquisition: Acquisition
) -> Volume:
    """Signal to magnitude image through k-space."""
    shape, axis = signal.shape, scanner.slice_axis
    resolution_mm = np.full(3, scanner.in_plane_mm)
    resolution_mm[axis] = scanner.slice_mm
    kept = np.minimum(spacing_mm / np.maximum(resolution_mm, 1e-6), 1.0)
    windows = [_window(n, share, scanner.gibbs) for n, share in zip(shape, kept, strict=True)]
    passed = float(np.prod([np.mean(w**2) for w in windows]))

    seen = (signal * coil_sensitivity(shape, scanner, acquisition)).astype(np.complex64)
    if scanner.noise > 0:
        rng = np.random.default_rng(acquisition.noise_seed)
        noise = rng.standard_normal((*shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        seen += np.float32(scanner.noise / np.sqrt(passed)) * noise
    spectrum = fft.fftn(seen, overwrite_x=True)
    for a, window in enumerate(windows):
        if window.min() < 1:
            spectrum *= window.reshape([-1 if b == a else 1 for b in range(3)])
    if acquisition.movements:
        spectrum *= _movement_phases(shape, spacing_mm, scanner, acquisition)
    if slices < shape[axis]:
        frequencies = np.r_[: (slices + 1) // 2, -(slices // 2) : 0]
        spectrum = np.take(spectrum, frequencies, axis=axis) * np.float32(slices / shape[axis])
    magnitude: Volume = np.abs(fft.ifftn(spectrum, overwrite_x=True))
    return magnitude


def _window(count: int, kept: float, gibbs: float) -> Volume:
    """Weights of k-space along one axis: `kept` of the band, tapered beyond the share `gibbs` of that."""
    if kept >= 1:
        return np.ones(count, np.float32)
    radius = np.abs(fft.fftfreq(count)) / (0.5 * kept)
    taper = 0.5 * (1 + np.cos(np.pi * np.clip((radius - gibbs) / max(1 - gibbs, 1e-6), 0, 1)))
    return np.where(radius <= 1, np.where(radius <= gibbs, 1.0, taper), 0.0).astype(np.float32)


def _movement_phases(
    shape: tuple[int, ...], spacing_mm: NDArray[np.float64], scanner: Scanner, acquisition: Acquisition
) -> NDArray[np.complex64]:
    """Phase of each k-space line: lines beyond a movement see a shifted head (Fourier shift theorem)."""
    readout, phase = (a for a in range(3) if a != scanner.slice_axis)
    along_read = fft.fftfreq(shape[readout], spacing_mm[readout])[:, None]
    along_phase = fft.fftfreq(shape[phase], spacing_mm[phase])[None, :]
    place = fft.fftfreq(shape[phase])[None, :]
    radians = np.zeros((shape[readout], shape[phase]))
    for movement in acquisition.movements:
        beyond = place > movement.at if movement.at > 0 else place < movement.at
        ramp = along_read * movement.shift_mm[0] + along_phase * movement.shift_mm[1]
        radians += beyond * (-2 * np.pi * ramp)
    phases = np.exp(1j * radians).astype(np.complex64)
    return np.expand_dims(phases, scanner.slice_axis)


def _curve(magnitude: Volume, scanner: Scanner) -> Volume:
    if scanner.gamma == 1:
        return magnitude
    return (_CURVE_PIVOT * (magnitude / _CURVE_PIVOT) ** np.float32(scanner.gamma)).astype(np.float32)


def _units(magnitude: Volume, scanner: Scanner, acquisition: Acquisition) -> Volume:
    return (magnitude * np.float32(scanner.scale * acquisition.gain) + np.float32(scanner.offset)).astype(
        np.float32
    )


def write_scan(path: Path, values: Volume, affine: Affine, scanner: Scanner) -> None:
    """Write `values` [x y z] as the scanner would: its orientation, type, slope, header. Atomic."""
    stored, affine = _oriented(values, affine, scanner.orientation)
    slope, intercept = (scanner.slope, scanner.intercept) if scanner.slope else (1.0, 0.0)
    kind = np.dtype(scanner.dtype)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        stored = np.clip(np.rint((stored - intercept) / slope), limits.min, limits.max).astype(kind)
    else:
        stored = ((stored - intercept) / slope).astype(kind)
    _save(path, stored, affine, scanner, slope=(scanner.slope, scanner.intercept) if scanner.slope else None)


def write_labels(path: Path, labels: NDArray[Any], affine: Affine, scanner: Scanner) -> None:
    """Write a label volume [x y z] beside its scan: same orientation and affine, no slope. Atomic."""
    stored, affine = _oriented(labels, affine, scanner.orientation)
    _save(path, stored, affine, scanner, slope=None)


def _oriented(values: NDArray[Any], affine: Affine, codes: str) -> tuple[NDArray[Any], Affine]:
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    turned = nib.orientations.apply_orientation(values, turn)
    return turned, affine @ nib.orientations.inv_ornt_aff(turn, values.shape)


def _save(
    path: Path,
    stored: NDArray[Any],
    affine: Affine,
    scanner: Scanner,
    slope: tuple[float, float] | None,
) -> None:
    if scanner.header == "trailing_axis":
        stored = stored[..., None]
    image = nib.Nifti1Image(stored, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=0 if scanner.header == "qform_only" else 1)
    image.set_qform(affine, code=0 if scanner.header == "sform_only" else 1)
    if slope is not None:
        image.header.set_slope_inter(*slope)  # written as it is: the voxels are divided already
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    nib.save(image, partial)
    partial.chmod(OWNER)  # it may be a patient's, restyled
    partial.replace(path)
