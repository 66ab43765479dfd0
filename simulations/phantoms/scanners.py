"""Simulated scanners: what is drawn about a hospital's MR scanner and about one acquisition on it.

A scanner is the truth about style: sequence and field (hence tissue contrast), receive coil (bias field),
resolution and slice thickness, noise, apodisation (ringing), motion, intensity units, and how its files are
written. Everything is drawn here and applied in `scans.py`; nothing here touches an image.

Source of contrast: inversion-recovery (MPRAGE) and spoiled gradient-echo signal equations, with T1 of grey
and white matter after Rooney et al. 2007 (doi:10.1002/mrm.21122), a power law of the field; the other T1 and
all proton densities are round textbook values.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forms.form import build
from simulations.phantoms.patients import TISSUES

PROTON_DENSITY = {
    "csf": 1.0,
    "gm": 0.82,
    "wm": 0.70,
    "lesion": 0.82,
    "bone": 0.10,
    "fat": 0.75,
    "muscle": 0.72,
}
COIL_ORDER = 4
"""Coil patterns are sums of Legendre polynomials of degree below this along each axis."""
REFERENCE_VOXEL_MM = 2.0
"""Voxel of the phantoms, to which resolutions are relative when an existing image is restyled."""


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """A hospital's scanner. Signals are relative to white matter."""

    name: str = "scanner"
    """What the reports call it."""
    field_t: float = 3.0
    """Main field, tesla."""
    sequence: Literal["mprage", "spgr"] = "mprage"
    """Inversion-recovery or spoiled gradient echo."""
    repetition_ms: float = 2300.0
    """Repetition time."""
    inversion_ms: float = 1000.0
    """Inversion time (`mprage`)."""
    flip_deg: float = 9.0
    """Excitation angle (`spgr`)."""
    fat_suppression: float = 0.0
    """Share of the fat signal that is suppressed."""
    gamma: float = 1.0
    """Exponent of the contrast curve that the console applies."""
    coil_strength: float = 0.2
    """Standard deviation of the log sensitivity over the field of view."""
    coil_seed: int = 0
    """Seed of the coil's fixed pattern."""
    in_plane_mm: float = 2.0
    """Acquired resolution in the slice plane."""
    slice_mm: float = 2.0
    """Slice thickness, and distance between slices."""
    slice_axis: Literal[0, 1, 2] = 2
    """Axis of the slices: 0 sagittal, 1 coronal, 2 axial."""
    gibbs: float = 0.3
    """0: fully apodised, no ringing; 1: hard edge of k-space."""
    noise: float = 0.03
    """Deviation of the complex noise, as a share of the white-matter signal (Rician magnitude)."""
    motion_mm: float = 0.0
    """Deviation of sudden head movements during the scan."""
    scale: float = 600.0
    """Stored intensity of white matter."""
    offset: float = 0.0
    """Stored intensity of no signal."""
    dtype: Literal["uint8", "int16", "uint16", "float32"] = "int16"
    """Type of the stored voxels."""
    slope: float = 0.0
    """Slope in the header; 0: none written."""
    intercept: float = 0.0
    """Intercept in the header, used with a slope."""
    orientation: str = "RAS"
    """Directions in which the stored axes run (nibabel's axis codes)."""
    oblique_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Rotation of the field of view about x, y, z."""
    header: Literal["plain", "sform_only", "qform_only", "trailing_axis"] = "plain"
    """Which affine the header holds; or a fourth axis of length one."""
    gain_jitter: float = 0.05
    """Deviation of the log gain from scan to scan."""

    def __post_init__(self) -> None:
        """Refuse what no scanner does."""
        positive = ("field_t", "repetition_ms", "gamma", "in_plane_mm", "slice_mm", "scale")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"Expected scanner {self.name!r} to have {name} > 0; got {getattr(self, name)}."
                )
        if not 0 <= self.gibbs <= 1:
            raise ValueError(f"Expected scanner {self.name!r} to have gibbs in [0, 1]; got {self.gibbs}.")
        if sorted(_AXIS_OF.get(code, -1) for code in self.orientation) != [0, 1, 2]:
            raise ValueError(f"Expected three axis codes such as RAS or PSR; got {self.orientation!r}.")

    @property
    def signals(self) -> dict[str, float]:
        """Signal of each tissue relative to white matter."""
        raw = {tissue: self._signal(tissue) for tissue in TISSUES}
        raw["fat"] *= 1 - self.fat_suppression
        return {tissue: raw[tissue] / raw["wm"] for tissue in TISSUES}

    def _signal(self, tissue: str) -> float:
        density, t1_ms = PROTON_DENSITY[tissue], t1_relaxation_ms(tissue, self.field_t)
        recovered = math.exp(-self.repetition_ms / t1_ms)
        if self.sequence == "spgr":
            angle = math.radians(self.flip_deg)
            return density * math.sin(angle) * (1 - recovered) / (1 - recovered * math.cos(angle))
        inverted = 1 - 2 * math.exp(-self.inversion_ms / t1_ms) / (1 + recovered)
        return density * abs(inverted)


_AXIS_OF = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


def t1_relaxation_ms(tissue: str, field_t: float) -> float:
    """T1 of a tissue at `field_t` tesla."""
    at_one_tesla_and_exponent = {
        "csf": (4200.0, 0.0),
        "gm": (857.0, 0.376),
        "wm": (583.0, 0.382),
        "lesion": (930.0, 0.376),
        "bone": (600.0, 0.3),
        "fat": (230.0, 0.3),
        "muscle": (870.0, 0.42),
    }
    at_one_tesla, exponent = at_one_tesla_and_exponent[tissue]
    return at_one_tesla * math.pow(field_t, exponent)


@dataclass(frozen=True, kw_only=True)
class Movement:
    """A sudden movement: the part of k-space beyond `at` is read from a shifted head."""

    at: float
    """Place along the phase-encoding axis, -0.5 to 0.5 of the sampled band; outside the centre."""
    shift_mm: tuple[float, float]
    """Shift along the two in-plane axes."""


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """What differs between two scans on one scanner; drawn, then applied."""

    noise_seed: int = 0
    """Seed of the noise."""
    gain: float = 1.0
    """Factor on the stored intensities."""
    coil_jitter: tuple[float, ...] = ()
    """Added to the linear coefficients of the coil pattern (three of them, or none)."""
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Displacement of the field of view from the middle of the head."""
    tilt_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Added to the scanner's oblique rotation."""
    movements: tuple[Movement, ...] = ()
    """Movements during the scan."""


def draw_scanner(rng: np.random.Generator, index: int, name: str) -> Scanner:
    """Draw the scanner of hospital number `index`.

    The first three hospitals get one of three families each (a quiet 3 T, an old 1.5 T with thick slices, a
    3 T with a surface coil and raw float units) with drawn details; later ones take every property from a
    family of its own choice or at random, so that any number of hospitals differ from each other.
    """
    families = [_quiet_3t(rng), _old_1t5(rng), _surface_coil_3t(rng)]
    if index < len(families):
        chosen = families[index]
    else:
        contrast, receive, files = (families[i] for i in rng.integers(len(families), size=3))
        own_scale = float(np.exp(rng.uniform(np.log(100), np.log(3000))))
        chosen = contrast | {k: receive[k] for k in _RECEIVE} | {k: files[k] for k in _FILES}
        chosen |= {
            "gamma": float(rng.uniform(0.75, 1.35)),
            "fat_suppression": float(rng.uniform(0.2, 0.9)),
            "coil_strength": float(rng.uniform(0.05, 0.23)),
            "noise": float(np.exp(rng.uniform(np.log(0.02), np.log(0.065)))),
            "scale": own_scale * (100 if chosen["dtype"] == "float32" else 1),
        }
    seed = int(rng.integers(2**31))
    scanner: Scanner = build(Scanner, chosen | {"name": name, "coil_seed": seed}, f"scanner {name}")
    return scanner


def with_settings(scanner: Scanner, settings: dict[str, object]) -> Scanner:
    """`scanner` with some fields set by hand; an unknown or ill-typed field raises `ValueError`."""
    merged = dataclasses.asdict(scanner) | settings
    changed: Scanner = build(Scanner, merged, f"scanner {scanner.name}")
    return changed


def draw_acquisition(rng: np.random.Generator, scanner: Scanner) -> Acquisition:
    """Draw one scan on `scanner`: gain, patient placement, movements, noise."""
    seed = int(rng.integers(2**31))
    gain = float(np.exp(scanner.gain_jitter * rng.normal()))
    coil = tuple(float(c) for c in 0.15 * scanner.coil_strength * rng.normal(size=3))
    shift = rng.uniform(-2.5, 2.5, size=3)
    tilt = rng.normal(scale=0.7, size=3) * (np.abs(scanner.oblique_deg).max() > 0)
    movements: list[Movement] = []
    if scanner.motion_mm > 0:
        for _ in range(int(rng.poisson(1.5))):
            at = float(rng.uniform(0.08, 0.45) * rng.choice([-1, 1]))
            u, v = scanner.motion_mm * rng.normal(size=2)
            movements.append(Movement(at=at, shift_mm=(float(u), float(v))))
    return Acquisition(
        noise_seed=seed,
        gain=gain,
        coil_jitter=coil,
        shift_mm=(float(shift[0]), float(shift[1]), float(shift[2])),
        tilt_deg=(float(tilt[0]), float(tilt[1]), float(tilt[2])),
        movements=tuple(movements),
    )


_RECEIVE = ("in_plane_mm", "slice_mm", "slice_axis", "gibbs", "motion_mm")
_FILES = ("offset", "dtype", "slope", "intercept", "orientation", "oblique_deg", "header")


def _quiet_3t(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "field_t": 3.0,
        "sequence": "mprage",
        "repetition_ms": 2300.0,
        "inversion_ms": float(rng.uniform(1000, 1100)),
        "fat_suppression": float(rng.uniform(0.45, 0.6)),
        "gamma": 1.0,
        "coil_strength": float(rng.uniform(0.08, 0.14)),
        "in_plane_mm": 2.0,
        "slice_mm": 2.0,
        "slice_axis": 0,
        "gibbs": 0.9,
        "noise": float(rng.uniform(0.02, 0.03)),
        "motion_mm": 0.0,
        "scale": float(rng.uniform(500, 900)),
        "offset": 0.0,
        "dtype": "int16",
        "slope": 0.0,
        "intercept": 0.0,
        "orientation": str(rng.choice(["RAS", "LAS"])),
        "oblique_deg": (0.0, 0.0, 0.0),
        "header": "plain",
    }


def _old_1t5(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "field_t": 1.5,
        "sequence": "spgr",
        "repetition_ms": float(rng.uniform(18, 25)),
        "flip_deg": float(rng.uniform(28, 34)),
        "fat_suppression": float(rng.uniform(0.4, 0.5)),
        "gamma": float(rng.uniform(0.8, 0.95)),
        "coil_strength": float(rng.uniform(0.04, 0.08)),
        "in_plane_mm": float(rng.uniform(2.4, 2.8)),
        "slice_mm": float(rng.uniform(3.4, 4.2)),
        "slice_axis": 2,
        "gibbs": float(rng.uniform(0.8, 1.0)),
        "noise": float(rng.uniform(0.05, 0.065)),
        "motion_mm": float(rng.uniform(0.5, 1.0)),
        "scale": float(rng.uniform(130, 220)),
        "offset": float(rng.uniform(5, 15)),
        "dtype": "uint16",
        "slope": float(rng.uniform(0.1, 0.2)),
        "intercept": float(rng.uniform(-20, -5)),
        "orientation": str(rng.choice(["LPI", "LPS"])),
        "oblique_deg": (0.0, 0.0, 0.0),
        "header": str(rng.choice(["sform_only", "trailing_axis"])),
    }


def _surface_coil_3t(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "field_t": 3.0,
        "sequence": "mprage",
        "repetition_ms": 2000.0,
        "inversion_ms": float(rng.uniform(820, 900)),
        "fat_suppression": float(rng.uniform(0.75, 0.9)),
        "gamma": float(rng.uniform(1.1, 1.25)),
        "coil_strength": float(rng.uniform(0.18, 0.23)),
        "in_plane_mm": float(rng.uniform(2.2, 2.6)),
        "slice_mm": 2.0,
        "slice_axis": 1,
        "gibbs": float(rng.uniform(0.1, 0.3)),
        "noise": float(rng.uniform(0.03, 0.045)),
        "motion_mm": 0.0,
        "scale": float(rng.uniform(2e4, 9e4)),
        "offset": 0.0,
        "dtype": "float32",
        "slope": 0.0,
        "intercept": 0.0,
        "orientation": str(rng.choice(["PSR", "PIR"])),
        "oblique_deg": tuple(float(a) for a in rng.uniform(4, 9, size=3) * rng.choice([-1, 1], size=3)),
        "header": "qform_only",
    }
