"""Where a NIfTI scan lies in the patient, and what happens when its header says so twice and differently.

The standard (https://nifti.nimh.nih.gov/nifti-1) gives two sources, sform and qform with pixdim, each with a
code that says in which space. The rules, in this order:

1. Neither has a code: nothing says which side is left (`no_orientation`).
2. Lengths are in the unit of xyzt_units; no unit is millimetres. Another unit is converted, and said.
3. qfac 0 is 1; a quaternion longer than 1 by a rounding is shortened; the sign of a size in pixdim is
   ignored, and said.
4. Both have a code and are mirrored or turned by 45 degrees or more against each other: `left_in_doubt`.
5. The sizes of a voxel differ by more than 1%: a sform of 1 x 1 x 1 mm lost its scale, and the qform is
   taken, if it has a code; a sform of a template's space may scale by up to a half and is taken; pixdim of
   1 x 1 x 1 without a qform is a default, and the sform is taken; anything else is `sizes_contradict`. Said.
6. Otherwise the sform, if it has a code, else the qform. That both have the same code and lie more than a
   degree or a voxel apart is said.

Does not do: judge the affine (`scans.check_affine`).
"""

from typing import Any

import numpy as np
from jaxtyping import Float64

from scans.scans import Note, Reason, UnusableScan

MM = {1: 1e3, 2: 1.0, 3: 1e-3}
"""Millimetres in a unit of xyzt_units: metre, millimetre, micron."""
LONGEST_QUATERNION = 1.001
"""Square of its length, up to which more than 1 is a rounding."""
SAME_SIZE = 0.01
TURNED_DEGREES, SAME_DEGREES = 45.0, 1.0
LARGEST_TEMPLATE_SCALING = 1.5


def place_of(header: Any, placeless: bool) -> tuple[Float64[np.ndarray, "4 4"], tuple[Note, ...]]:
    """Affine (RAS+ mm) of a NIfTI header as nibabel reads it, unrepaired, and what a person should look at.

    `placeless`: rule 1 gives NaN, but for the voxels' edges on the diagonal.
    """
    edges = np.asarray(header["pixdim"][1:4], np.float64)
    coded = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    if max(coded.values()) <= 0:
        return _unplaced(edges, placeless), ()
    notes: list[Note] = []
    unit = MM.get(int(header["xyzt_units"]) & 7, 1.0)
    if unit != 1.0:
        notes.append(Note.UNIT)
    if (edges < 0).any():
        notes.append(Note.NEGATIVE_SPACING)
    edges = np.abs(edges)
    sform = _sform(header) if coded["sform"] > 0 else None
    qform = _qform(header, edges) if coded["qform"] > 0 else None
    affine = _chosen(sform, qform, edges, coded, notes)
    affine[:3] *= unit
    return affine, tuple(notes)


def _unplaced(edges: np.ndarray, placeless: bool) -> np.ndarray:
    if (edges == 0).any():
        raise UnusableScan(Reason.ZERO_SPACING)
    if not placeless:
        raise UnusableScan(Reason.NO_ORIENTATION, "neither sform nor qform")
    unplaced = np.diag([*np.abs(edges), 1.0])
    unplaced[:3, 3] = np.nan
    return unplaced


def _sform(header: Any) -> np.ndarray:
    affine = np.eye(4)
    affine[:3] = [header["srow_x"], header["srow_y"], header["srow_z"]]
    return affine


def _qform(header: Any, edges: np.ndarray) -> np.ndarray:
    b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
    square = b * b + c * c + d * d
    if not square <= LONGEST_QUATERNION:
        raise UnusableScan(Reason.SINGULAR_AFFINE, "no valid quaternion")
    if square > 1.0:
        b, c, d = (value / square**0.5 for value in (b, c, d))
    a = max(0.0, 1.0 - square) ** 0.5
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    qfac = -1.0 if float(header["pixdim"][0]) < 0 else 1.0
    affine[:3, :3] = turn * (edges * [1.0, 1.0, qfac])
    affine[:3, 3] = [header[f"qoffset_{name}"] for name in "xyz"]
    return affine


def _chosen(
    sform: np.ndarray | None,
    qform: np.ndarray | None,
    edges: np.ndarray,
    coded: dict[str, int],
    notes: list[Note],
) -> np.ndarray:
    if sform is None:
        assert qform is not None
        return qform
    own = np.linalg.norm(sform[:3, :3], axis=0)
    if not (np.isfinite(sform).all() and own.min() > 0 and np.isfinite(edges).all() and edges.min() > 0):
        return sform  # one of the two says nothing; the affine's own check has the word
    if qform is not None:
        _check_left(sform, qform)
    ratio = float(np.maximum(own / edges, edges / own).max())
    if ratio > 1.0 + SAME_SIZE:
        return _of_one_size(sform, qform, own, edges, coded, notes)
    if qform is not None and coded["sform"] == coded["qform"] and _apart(sform, qform):
        notes.append(Note.TWO_PLACES)
    return sform


def _of_one_size(
    sform: np.ndarray,
    qform: np.ndarray | None,
    own: np.ndarray,
    edges: np.ndarray,
    coded: dict[str, int],
    notes: list[Note],
) -> np.ndarray:
    """Rule 5."""
    if qform is not None and np.allclose(own, 1.0, atol=1e-3):
        notes.append(Note.SFORM_WITHOUT_SCALE)
        return qform
    ratio = float(np.maximum(own / edges, edges / own).max())
    template = qform is not None and coded["sform"] > 1 and coded["sform"] != coded["qform"]
    if template and ratio <= LARGEST_TEMPLATE_SCALING:
        notes.append(Note.PIXDIM_IGNORED)
        return sform
    if qform is None and np.allclose(edges, 1.0, atol=1e-3):
        notes.append(Note.PIXDIM_IGNORED)
        return sform
    both_sizes = [" x ".join(f"{edge:.4g}" for edge in sizes) for sizes in (own, edges)]
    raise UnusableScan(Reason.SIZES_CONTRADICT, f"sform {both_sizes[0]}, pixdim {both_sizes[1]}")


def _directions(affine: np.ndarray) -> np.ndarray:
    """The rotation, mirrored or not, nearest to an affine."""
    left, _, right = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    return np.asarray(left @ right)


def _degrees(sform: np.ndarray, qform: np.ndarray) -> float:
    cosine = (np.trace(_directions(sform) @ _directions(qform).T) - 1.0) / 2.0
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _check_left(sform: np.ndarray, qform: np.ndarray) -> None:
    """Rule 4."""
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        raise UnusableScan(Reason.LEFT_IN_DOUBT, "sform and qform are mirrored")
    if (degrees := _degrees(sform, qform)) >= TURNED_DEGREES:
        raise UnusableScan(Reason.LEFT_IN_DOUBT, f"sform and qform are {degrees:.0f} degrees apart")


def _apart(sform: np.ndarray, qform: np.ndarray) -> bool:
    edge_mm = np.linalg.norm(qform[:3, :3], axis=0).min()
    moved = np.linalg.norm(sform[:3, 3] - qform[:3, 3]) > edge_mm
    return bool(moved or _degrees(sform, qform) > SAME_DEGREES)
