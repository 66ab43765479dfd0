"""Simulated patients: smooth invertible deformations of the ICBM 152 anatomy, ageing, and lesions.

A patient is a small drawn value; the anatomy it stands for is a function of space that any scanner can sample
on any grid, so the same patient seen by two scanners is the same to the last digit. The deformation is the
flow of a stationary velocity field (scaling and squaring: Arsigny et al. 2006, doi:10.1007/11866565_113),
hence smooth and invertible; the inverse is the flow of the opposite field. Ageing widens the ventricles by
such a flow and turns the rim of the cortex into fluid. Nothing here knows about scanners or files.

Axes: c = channels, x y z = voxels of a grid, i j k = control points; millimetres are the world's (RAS).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter

from simulations.phantoms.atlas import (
    CHANNELS,
    FIELD_OF_VIEW_MM,
    ORIGIN_MM,
    Atlas,
    Volume,
    load_atlas,
)

TISSUES = ("csf", "gm", "wm", "lesion", "bone", "fat", "muscle")

CONTROL_SPACING_MM = 24.0
LATTICE_MM = 4.0
LATTICE_MARGIN_MM = 8.0
SQUARINGS = 6
CENTRE_MM = np.array([0.0, -17.0, 5.0])
"""Centre of the brain, around which head size acts."""
_SAMPLED = CHANNELS[:5]
_EDGE_MM = 2.0
_VENTRICLE_GROWTH_MM = 5.0


@dataclass(frozen=True, kw_only=True)
class Population:
    """Who comes to a hospital."""

    age_mean: float = 55.0
    """Years."""
    age_sd: float = 14.0
    """Years."""
    female_share: float = 0.5
    """Share of women."""
    disease_share: float = 0.4
    """Share of patients with white-matter lesions."""
    lesions_mean: float = 6.0
    """Lesions of a patient who has the disease, on average (at least one)."""
    deformation_mm: float = 4.0
    """About the root mean square displacement of anatomy between a patient and the template, per axis."""
    head_size_sd: float = 0.03
    """Deviation of head size, as a share of it."""


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid of damaged white matter, in template space."""

    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Patient:
    """Everything that is drawn about a patient; the truth about content."""

    age: float
    """Years."""
    sex: Literal["F", "M"]
    atrophy: float
    """0 at 25 years, about 1 at 85, with spread."""
    head_size: tuple[float, float, float]
    """Size relative to the template along x, y, z."""
    skull_mm: float
    """Thickness of the skull."""
    scalp_mm: float
    """Thickness of the fat under the skin."""
    lesions: tuple[Lesion, ...]
    velocity: NDArray[np.float32] = field(repr=False)
    """Cubic B-spline coefficients of the stationary velocity field, mm, [3 i j k]."""

    def to_dict(self) -> dict[str, Any]:
        """All but the velocity, as plain values."""
        shallow = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("velocity", "lesions")
        }
        return {**shallow, "lesions": [dataclasses.asdict(lesion) for lesion in self.lesions]}

    @property
    def sha256(self) -> str:
        """Hash of the whole draw, 64 hex digits."""
        text = json.dumps(self.to_dict(), sort_keys=True).encode()
        return hashlib.sha256(text + self.velocity.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A patient on a grid: `tissues` shares in [0, 1] [c x y z] in the order of `TISSUES`; the remainder is
    air. `texture` [x y z] is signal beyond the tissues, in units of the grey-white contrast. `affine`: voxel
    to world, mm.
    """

    tissues: Volume
    texture: Volume
    affine: NDArray[np.float64]


def control_shape() -> tuple[int, int, int]:
    """Control points of the velocity field along each axis."""
    x, y, z = (
        int(np.ceil((side + 2 * LATTICE_MARGIN_MM) / CONTROL_SPACING_MM)) + 3 for side in FIELD_OF_VIEW_MM
    )
    return x, y, z


def draw_patient(rng: np.random.Generator, population: Population) -> Patient:
    """Draw a patient of `population`; the order of the draws is part of the seed's meaning."""
    age = float(np.clip(rng.normal(population.age_mean, population.age_sd), 20.0, 92.0))
    sex: Literal["F", "M"] = "F" if rng.random() < population.female_share else "M"
    atrophy = float(np.clip((age - 25) / 60 + rng.normal(0, 0.08), 0.0, 1.2))
    overall = (0.985 if sex == "F" else 1.015) + population.head_size_sd * np.clip(rng.normal(), -2.5, 2.5)
    head_size = overall * (1 + 0.3 * population.head_size_sd * rng.normal(size=3))
    skull_mm, scalp_mm = rng.uniform(4.5, 8.0), rng.uniform(3.0, 8.0)
    fine = rng.normal(size=(3, *control_shape()))
    broad = gaussian_filter(rng.normal(size=fine.shape), sigma=(0, 1.2, 1.2, 1.2), mode="wrap")
    # A cubic B-spline of white coefficients keeps a third of their deviation; these weights undo it.
    velocity = population.deformation_mm * (1.35 * fine + 0.9 * broad / broad.std())
    lesions: tuple[Lesion, ...] = ()
    if rng.random() < population.disease_share:
        lesions = tuple(_draw_lesion(rng) for _ in range(1 + rng.poisson(population.lesions_mean - 1)))
    return Patient(
        age=round(age, 1),
        sex=sex,
        atrophy=atrophy,
        head_size=(float(head_size[0]), float(head_size[1]), float(head_size[2])),
        skull_mm=skull_mm,
        scalp_mm=scalp_mm,
        lesions=lesions,
        velocity=velocity.astype(np.float32),
    )


def _draw_lesion(rng: np.random.Generator) -> Lesion:
    sites = _lesion_sites()
    centre = sites[rng.integers(len(sites))] + rng.uniform(-2, 2, size=3)
    radii = rng.uniform(2.5, 7.0) * rng.uniform(0.75, 1.3, size=3)
    return Lesion(tuple(map(float, centre)), tuple(map(float, radii)))  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _lesion_sites() -> NDArray[np.float64]:
    """Deep white matter of the template above the brain stem, mm, [n 3]."""
    atlas = load_atlas(4)
    gm, wm, _, outside_mm, _, _ = atlas.channels
    index = np.argwhere((wm > 0.85) & (gm < 0.15) & (outside_mm < -10))
    sites: NDArray[np.float64] = index @ atlas.affine[:3, :3].T + atlas.affine[:3, 3]
    return sites[sites[:, 2] > -15]


def displacement_mm(patient: Patient, *, inverse: bool = False) -> NDArray[np.float32]:
    """How far the patient's flow carries each point of a 4 mm lattice around the head, mm, [3 x y z].

    Forward carries template to patient (before head size); `inverse` carries it back.
    `lattice_affine()` places the lattice.
    """
    velocity = _velocity_on_lattice(patient)
    field_mm = torch.from_numpy(-velocity if inverse else velocity) / 2**SQUARINGS
    points = torch.from_numpy(_grid_points(lattice_affine(), velocity.shape[1:]))
    for _ in range(SQUARINGS):
        field_mm = field_mm + _sample(field_mm, lattice_affine(), points + field_mm)
    carried: NDArray[np.float32] = field_mm.numpy()
    return carried


def lattice_affine() -> NDArray[np.float64]:
    """Voxel to world of the displacement lattice, [4 4]."""
    affine = np.diag([LATTICE_MM] * 3 + [1.0])
    affine[:3, 3] = np.asarray(ORIGIN_MM) - LATTICE_MARGIN_MM
    return affine


def apply_patient(
    patient: Patient,
    atlas: Atlas,
    affine: NDArray[np.float64] | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Anatomy:
    """The patient's anatomy on a grid (`affine` voxel to world in mm, `shape`); default: the atlas's own."""
    affine = atlas.affine if affine is None else affine
    shape = atlas.channels.shape[1:] if shape is None else shape
    channels = atlas.channels[: len(_SAMPLED)]
    if patient.lesions:
        channels = np.concatenate([channels, _paint_lesions(patient.lesions, atlas)[None]])
    resized = _head_size_affine(patient)
    points = torch.from_numpy(_grid_points(np.linalg.inv(resized) @ affine, shape))
    inverse = torch.from_numpy(displacement_mm(patient, inverse=True))
    points = points + _sample(inverse, lattice_affine(), points)
    sampled = _sample(torch.from_numpy(channels), atlas.affine, points).numpy()
    return _tissues(patient, sampled, affine)


def _head_size_affine(patient: Patient) -> NDArray[np.float64]:
    affine = np.diag([*patient.head_size, 1.0])
    affine[:3, 3] = CENTRE_MM - affine[:3, :3] @ CENTRE_MM
    return affine


def _tissues(patient: Patient, sampled: Volume, affine: NDArray[np.float64]) -> Anatomy:
    gm, wm, texture, outside_brain_mm, outside_soft_mm = sampled[: len(_SAMPLED)]
    fluid_mm = 1.0 + 2.5 * patient.atrophy
    brain = _inside(outside_brain_mm)
    gm, wm = np.minimum(gm, brain), np.minimum(wm, brain)
    gm = gm - np.minimum(gm, 1.6 * patient.atrophy * gm * np.clip(brain - gm - wm, 0, 1))
    lesion = np.clip(sampled[len(_SAMPLED)], 0, 1) * wm if patient.lesions else np.zeros_like(wm)
    wm = wm - lesion
    dura = _inside(outside_brain_mm - fluid_mm)
    csf = np.clip(dura - gm - wm - lesion, 0, 1)

    skull_surface_mm = outside_brain_mm - (fluid_mm + patient.skull_mm)
    skull = _inside(skull_surface_mm)
    marrow_mm = np.abs(skull_surface_mm + patient.skull_mm / 2) - patient.skull_mm / 6
    marrow = 0.5 * _inside(marrow_mm) * (skull - dura)
    surface_mm = np.minimum(skull_surface_mm - patient.scalp_mm, outside_soft_mm)
    outer = np.clip(_inside(surface_mm) - skull, 0, 1)
    fat = _inside(-surface_mm - patient.scalp_mm) * outer
    tissues = np.stack([csf, gm, wm, lesion, skull - dura - marrow, fat + marrow, outer - fat])
    return Anatomy(tissues, texture * brain, affine)


def label_volume(anatomy: Anatomy) -> NDArray[np.uint8]:
    """Largest share per voxel among background (0), CSF, grey matter, white matter and lesion (4), [x y z].
    Bone, fat and muscle are background."""
    brain = anatomy.tissues[:4]
    shares = np.concatenate([1 - brain.sum(axis=0, keepdims=True), brain])
    labels: NDArray[np.uint8] = shares.argmax(axis=0).astype(np.uint8)
    return labels


def volumes_ml(anatomy: Anatomy) -> dict[str, float]:
    """Volume of each tissue, millilitres, partial volumes counted."""
    voxel_ml = abs(float(np.linalg.det(anatomy.affine[:3, :3]))) / 1000
    sums = anatomy.tissues.sum(axis=(1, 2, 3), dtype=np.float64)
    return {name: float(total) * voxel_ml for name, total in zip(TISSUES, sums, strict=True)}


def _inside(distance_mm: Volume) -> Volume:
    """Share of a voxel inside a surface, from the signed distance of its centre."""
    share: Volume = np.clip(0.5 - distance_mm / _EDGE_MM, 0, 1)
    return share


def _paint_lesions(lesions: tuple[Lesion, ...], atlas: Atlas) -> Volume:
    painted = np.zeros(atlas.channels.shape[1:], np.float32)
    step = atlas.resolution_mm
    for lesion in lesions:
        low = [
            int((c - 1.5 * r - o) // step)
            for c, r, o in zip(lesion.centre_mm, lesion.radii_mm, ORIGIN_MM, strict=True)
        ]
        high = [
            int((c + 1.5 * r - o) // step) + 2
            for c, r, o in zip(lesion.centre_mm, lesion.radii_mm, ORIGIN_MM, strict=True)
        ]
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        axes = [
            (np.arange(a, b) * step + o - c) / r
            for a, b, o, c, r in zip(low, high, ORIGIN_MM, lesion.centre_mm, lesion.radii_mm, strict=True)
        ]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        ball = np.clip(2.5 - 2 * np.sqrt(x**2 + y**2 + z**2), 0, 1)  # 1 within 0.75 radii, 0 beyond 1.25
        painted[box] = np.maximum(painted[box], ball)
    return painted


def _velocity_on_lattice(patient: Patient) -> NDArray[np.float32]:
    bx, by, bz = _spline_bases()
    smooth = np.einsum("cijk,xi,yj,zk->cxyz", patient.velocity, bx, by, bz, optimize=True)
    ageing = _VENTRICLE_GROWTH_MM * patient.atrophy * _ventricle_outward()
    summed: NDArray[np.float32] = (smooth + ageing).astype(np.float32)
    return summed


@lru_cache(maxsize=1)
def _spline_bases() -> tuple[NDArray[np.float32], ...]:
    """Cubic B-spline values of every control point at every lattice point, one matrix per axis."""
    bases = []
    for side, count in zip(FIELD_OF_VIEW_MM, control_shape(), strict=True):
        knots = np.arange(-3, count + 1, dtype=np.float64)
        at = np.arange(int((side + 2 * LATTICE_MARGIN_MM) / LATTICE_MM) + 1) * (
            LATTICE_MM / CONTROL_SPACING_MM
        )
        bases.append(BSpline.design_matrix(at, knots, 3).toarray().astype(np.float32))
    return tuple(bases)


@lru_cache(maxsize=1)
def _ventricle_outward() -> NDArray[np.float32]:
    """Smooth velocity pointing away from the ventricles, largest length one, on the lattice, [3 x y z]."""
    atlas = load_atlas(4)
    blurred = gaussian_filter(atlas.channels[CHANNELS.index("ventricles")], sigma=2.0)
    padded = np.pad(blurred, [(2, 3)] * 3)
    outward = -np.stack(np.gradient(padded))
    outward /= np.linalg.norm(outward, axis=0).max()
    return outward.astype(np.float32)


def _grid_points(affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """World position of every voxel, mm, [3 x y z]."""
    index = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    m = affine.astype(np.float32)
    points = [m[r, 0] * index[0] + m[r, 1] * index[1] + m[r, 2] * index[2] + m[r, 3] for r in range(3)]
    return np.stack(points)


def _sample(channels: torch.Tensor, affine: NDArray[np.float64], points: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of `channels` [c ...] (an axis-aligned grid) at world `points` [3 x y z]; edges
    are continued.
    """
    sizes = torch.tensor(channels.shape[1:], dtype=torch.float32)
    steps, origin = torch.from_numpy(affine.astype(np.float32)).diagonal()[:3], torch.tensor(affine[:3, 3])
    scale = 2.0 / (steps * (sizes - 1))
    shift = -origin.float() * scale - 1.0
    # grid_sample wants the last axis first
    grid = torch.stack([points[a] * scale[a] + shift[a] for a in (2, 1, 0)], dim=-1)
    sampled = torch.nn.functional.grid_sample(
        channels[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled[0]
