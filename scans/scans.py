"""What a scan is, and the closed list of reasons why a file is not one.

A scan is one 3-D array with the affine that places it in the patient (RAS+, millimetres). This file holds the
checks that do not depend on the file format: grid, affine, values. It reads nothing (`scans/nifti.py`,
`scans/dicom.py` do) and resamples nothing (`scans/volumes.py` does).

A `Reason` may leave the site as a count. The `detail` of an `UnusableScan` holds numbers only, never a path,
a name or a header's text.

Axes: x y z = voxels along the array's own axes, as stored; world axes are RAS+ in mm, as in NIfTI-1.
"""

import hashlib
import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

FourD = Literal["first", "mean", "refuse"]
"""What a 4-D scan becomes: its first volume, its mean over time, or an exclusion."""

MAXIMUM_VOXELS = 2**29
"""Largest volume that is read: 512 x 512 x 2048 voxels, 2 GiB as float32. Compared with the header, before
anything is allocated."""
MINIMUM_SLICES = 3
"""Fewest voxels along each axis. Three slices are the fewest whose spacing can be checked for being even."""
VOXEL_MM = (0.01, 100.0)
"""Plausible edge of a voxel. Outside, the unit of the header is wrong, and resampling would be nonsense."""
MAXIMUM_NOT_FINITE = 0.01
"""Share of NaN or infinite voxels that is repaired (to the lowest finite value); above it the scan is
excluded."""
BACKGROUND_SHARE = 0.1
"""Share of a scan from which on NaN that reach its border are background, not damage."""
BELOW_WATER_HU, FEW_VOXELS = -20.0, 1e-3
"""A CT has at least this share of voxels below this value: fat is at -100, air at -1000."""
BELOW_AIR_HU, MANY_VOXELS = -1150.0, 0.05
"""A CT has at most this share of voxels below this value: nothing is thinner than air."""
SINGULAR = 1e-3
"""Least volume of the unit parallelepiped of the affine's axes: below, two axes are within 0.06 degrees."""

ROUNDED = 1e-3
"""Largest distance of a label's value from the integer that it means."""
VALUES_SHOWN = 4
"""Values of a label that does not fit, in the detail of its exclusion."""
TILE = (64, 16)
"""Voxels along x and z that are turned from the order of a file to that of memory together."""
MOST_REGIONS, FEWEST_GREYS, ALIKE, BLOCK = 2048, 20, 0.5, 64
"""What tells a segmentation from a scan (`is_label_map`)."""


class Reason(StrEnum):
    """Why a file, or a DICOM series, is not in the cohort. Closed: code may count on it."""

    # what kind of file it is
    SIDECAR = "sidecar"  # a table, a text, a licence: belongs to the data set, holds no voxels
    TABLE = "table"  # read, for the manifest or for covariates; its detail says what came of it
    HIDDEN = "hidden"  # its name, or a folder's, begins with a dot
    NOT_A_SCAN = "not_a_scan"  # no known image inside
    UNSUPPORTED_FORMAT = "unsupported_format"  # an image of a kind that is not read (or not in this layout)
    WRONG_EXTENSION = "wrong_extension"  # the content is not what the name says
    EMPTY = "empty"  # no bytes, or no voxels
    TRUNCATED = "truncated"  # fewer bytes than the header promises
    CORRUPT = "corrupt"  # a header that contradicts itself, or a checksum that fails
    UNREADABLE = "unreadable"  # the operating system refuses
    NOT_FETCHED = (
        "not_fetched"  # the place of a file of git-annex, DataLad or Git LFS: its content is elsewhere
    )
    BROKEN_LINK = "broken_link"  # a link that leads nowhere
    LINKED_FILE = "linked_file"  # a link that leads out of the data root; followed with `follow_links`
    LINKED_FOLDER = "linked_folder"  # a link to a folder; followed with `follow_links`
    NOT_A_FILE = "not_a_file"  # a pipe, a socket, a device
    # its voxels
    RGB = "rgb"
    COMPLEX = "complex"
    CONSTANT = "constant"
    TWO_VALUED = "two_valued"  # a mask that calls itself a scan
    LABEL_MAP = "label_map"  # integers, region by region: a segmentation that calls itself a scan
    NOT_FINITE = "not_finite"  # more than 1% NaN or infinite
    # its grid
    TWO_D = "two_d"
    TOO_FEW_SLICES = "too_few_slices"
    FOUR_D = "four_d"  # and the plan says `four_d: refuse`
    TOO_MANY_DIMS = "too_many_dims"
    TOO_LARGE = "too_large"
    ZERO_SPACING = "zero_spacing"
    IMPLAUSIBLE_SPACING = "implausible_spacing"
    SINGULAR_AFFINE = "singular_affine"
    NO_ORIENTATION = "no_orientation"  # nothing says which side is left
    LEFT_IN_DOUBT = "left_in_doubt"  # sform and qform are mirrored or turned against each other
    SIZES_CONTRADICT = "sizes_contradict"  # two sources say different sizes of a voxel
    # DICOM
    NOT_AN_IMAGE = "not_an_image"  # a report, a plan, a structure set
    MOSAIC = "mosaic"
    MULTIFRAME = "multiframe"  # multi-frame without per-frame positions
    COMPRESSED_UNSUPPORTED = "compressed_unsupported"
    LOCALIZER = "localizer"  # a scout, by its image type
    SECONDARY_CAPTURE = "secondary_capture"  # a screenshot among slices, or without a place
    AMBIGUOUS_FRAMES = "ambiguous_frames"  # which frames make a volume is in doubt; detail: the attribute
    MIXED_ORIENTATION = "mixed_orientation"  # too few slices of this orientation to be a stack
    MIXED_SIZES = "mixed_sizes"
    UNEVEN_SLICES = "uneven_slices"  # a gap: a slice is missing
    GANTRY_TILT = "gantry_tilt"  # beyond what shear-resampling undoes
    SEVERAL_SERIES = "several_series"  # a folder with more than one, where one was asked for
    SPLIT_SERIES = "split_series"  # one series spread over several folders
    # whole scans
    NO_FOREGROUND = "no_foreground"  # nothing in it is brighter than background
    # its place in the cohort
    NO_SUCH_MODALITY = "no_such_modality"  # not the modality of the plan
    WITHDREW = "withdrew"  # its patient, who was forgotten at her wish
    NO_PATIENT = "no_patient"  # nothing says whose it is
    DUPLICATE = "duplicate"  # the same voxels again
    DERIVATIVE = "derivative"  # made from another scan
    NOT_IN_MANIFEST = "not_in_manifest"
    MISSING_FILE = "missing_file"  # the manifest names it; it is not there
    LABEL_WITHOUT_IMAGE = "label_without_image"
    LABEL_NOT_CHOSEN = "label_not_chosen"  # the scan has another label, preferred by the stated rule
    LABEL_MISMATCH = "label_mismatch"  # not on the grid of its image
    LABEL_NOT_INTEGER = "label_not_integer"


class Note(StrEnum):
    """What a person should look at in a scan that is read nonetheless, by a stated rule. Closed."""

    UNIT = "unit"  # the header's unit is not mm; converted
    SFORM_WITHOUT_SCALE = "sform_without_scale"  # 1 x 1 x 1 mm by sform only; the qform is taken
    TWO_PLACES = "two_places"  # sform and qform of one space differ; the sform is taken
    PIXDIM_IGNORED = "pixdim_ignored"  # sizes in pixdim that the sform does not have; the sform is taken
    NEGATIVE_SPACING = "negative_spacing"  # a size below zero in pixdim; its sign is ignored
    TRAILING_BYTES = "trailing_bytes"  # after the end of a gzip stream whose checksum is right; ignored
    NAN_BACKGROUND = "nan_background"  # NaN around the patient; becomes 0
    TILTED = "tilted"  # slices that are sheared against each other; resampled to a straight stack
    ROUNDED_POSITIONS = "rounded_positions"  # slices off a regular grid by less than a tenth of the spacing
    ORDER_BY_NUMBER = "order_by_number"  # only InstanceNumber tells the volumes of a series apart
    INVERTED = "inverted"  # MONOCHROME1: meant to be seen with the lowest value brightest; taken as stored
    NOT_HOUNSFIELD = "not_hounsfield"  # a CT whose values are not HU by their range; taken as they are


class UnusableScan(ValueError):
    """A file is not a usable scan. `reason` is one of a closed set, `detail` holds numbers only."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Exclusion:
    """A file, or the files of a series, that take no part, and why. Stays at the site."""

    path: Path
    reason: Reason
    detail: str = ""
    files: tuple[Path, ...] = ()
    """All files concerned; only `path` itself when empty."""

    @property
    def all_files(self) -> tuple[Path, ...]:
        """The files that this exclusion accounts for."""
        return self.files or (self.path,)


@dataclass(frozen=True, eq=False)
class Scan:
    """One 3-D scan (or label), as stored: slope and intercept applied, nothing reoriented or resampled."""

    array: Float32[np.ndarray, "x y z"]
    """Values; HU for a CT."""
    affine: Float64[np.ndarray, "4 4"]
    """Voxel indices to RAS+ mm."""
    num_volumes: int = 1
    """Volumes in the file (4-D), of which this is the first or the mean."""
    num_repaired: int = 0
    """Voxels that were NaN or infinite and became the lowest finite value."""
    placed: bool = False
    """Of a label: whether its header says nothing of its place, and it was given its image's."""
    notes: tuple[Note, ...] = ()
    """What a person should look at."""

    @cached_property
    def voxels_sha256(self) -> str:
        """Hash of shape and values, 64 hex digits; equal for the same scan under another name or header."""
        return self._voxels.hexdigest()

    @cached_property
    def scan_id(self) -> str:
        """Hash of shape, values and affine, 64 hex digits: all that `prepare` depends on."""
        digest = self._voxels.copy()
        digest.update((np.round(self.affine, 6) + 0.0).tobytes())  # + 0.0: no negative zeros
        return digest.hexdigest()

    @cached_property
    def _voxels(self) -> "hashlib._Hash":
        digest = hashlib.sha256(repr(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array).data)
        return digest


def check_shape(shape: Iterable[int], four_d: FourD) -> tuple[tuple[int, int, int], int]:
    """Spatial shape and number of volumes of an array of this `shape`, or `UnusableScan`.

    Trailing axes of length 1 are dropped. Needs only the header; compares it with `MAXIMUM_VOXELS`.
    """
    sizes = [int(n) for n in shape]
    if any(n < 0 for n in sizes):
        raise UnusableScan(Reason.CORRUPT, "a negative size")
    if not sizes or 0 in sizes:
        raise UnusableScan(Reason.EMPTY, "no voxels")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) < 3 or 1 in sizes[:3]:
        raise UnusableScan(Reason.TWO_D, f"sizes {sizes}")
    if len(sizes) > 4:
        raise UnusableScan(Reason.TOO_MANY_DIMS, f"{len(sizes)} axes")
    if min(sizes[:3]) < MINIMUM_SLICES:
        raise UnusableScan(
            Reason.TOO_FEW_SLICES, f"{min(sizes[:3])} along one axis, at least {MINIMUM_SLICES}"
        )
    num_volumes = sizes[3] if len(sizes) == 4 else 1
    if num_volumes > 1 and four_d == "refuse":
        raise UnusableScan(Reason.FOUR_D, f"{num_volumes} volumes")
    if (voxels := math.prod(sizes[:3])) > MAXIMUM_VOXELS:
        raise UnusableScan(Reason.TOO_LARGE, f"{voxels} voxels, at most {MAXIMUM_VOXELS}")
    return (sizes[0], sizes[1], sizes[2]), num_volumes


def check_affine(affine: Float64[np.ndarray, "4 4"]) -> None:
    """Refuse an affine that cannot be inverted or whose voxels have no plausible size."""
    if not np.isfinite(affine).all():
        raise UnusableScan(Reason.SINGULAR_AFFINE, "not finite")
    edges_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if edges_mm.min() < 1e-6:
        raise UnusableScan(Reason.ZERO_SPACING)
    if edges_mm.min() < VOXEL_MM[0] or edges_mm.max() > VOXEL_MM[1]:
        raise UnusableScan(Reason.IMPLAUSIBLE_SPACING, f"{edges_mm.min():.3g} to {edges_mm.max():.3g} mm")
    if abs(np.linalg.det(affine[:3, :3] / edges_mm)) < SINGULAR:
        raise UnusableScan(Reason.SINGULAR_AFFINE, "two axes coincide")


def combine(volumes: Iterator[np.ndarray], four_d: FourD) -> Float32[np.ndarray, "x y z"]:
    """The one volume that a series of volumes becomes. `first` draws only one; `mean` holds two at a time."""
    total = next(volumes)
    if four_d == "first":
        return to_float32(total)
    num_volumes = 1
    total = total.astype(np.float64)
    for volume in volumes:
        total += volume
        num_volumes += 1
    return to_float32(total / num_volumes)


def to_float32(values: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Contiguous float32; what does not fit becomes infinite, and is then counted as not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if values.ndim != 3 or values.flags.c_contiguous:
            return np.ascontiguousarray(values, dtype=np.float32)
        slabs = (values[:, :, z : z + TILE[1]] for z in range(0, values.shape[2], TILE[1]))
        return stacked(slabs, values.shape)


def stacked(slabs: Iterable[np.ndarray], shape: tuple[int, ...]) -> Float32[np.ndarray, "x y z"]:
    """Slabs that follow each other along z as one contiguous volume; beside it, one is held at a time."""
    turned, z = np.empty(shape, np.float32), 0
    with np.errstate(over="ignore", invalid="ignore"):
        for slab in slabs:
            for x in range(0, shape[0], TILE[0]):  # half the time of all at once: tiles fit the caches
                turned[x : x + TILE[0], :, z : z + slab.shape[2]] = slab[x : x + TILE[0]]
            z += slab.shape[2]
    return turned


def accept(
    array: Float32[np.ndarray, "x y z"],
    affine: Float64[np.ndarray, "4 4"],
    num_volumes: int = 1,
    notes: tuple[Note, ...] = (),
) -> Scan:
    """A scan, or `UnusableScan` when its values say nothing.

    Rule for NaN and infinity: NaN that fill at least a tenth of the scan from its border inwards are
    background and become 0; of all other voxels up to 1% become the lowest finite value, and the scan says
    how many (`num_repaired`); more is `not_finite`.
    """
    check_affine(affine)
    num_repaired = 0
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # a NaN anywhere is both
        array, num_repaired, notes = _repaired(array, notes)
        low, high = array.min(), array.max()
    if low == high:
        raise UnusableScan(Reason.CONSTANT)
    if all(((part == low) | (part == high)).all() for part in array):
        raise UnusableScan(Reason.TWO_VALUED)
    return Scan(array, affine, num_volumes, num_repaired, notes=notes)


def _repaired(
    array: Float32[np.ndarray, "x y z"], notes: tuple[Note, ...]
) -> tuple[Float32[np.ndarray, "x y z"], int, tuple[Note, ...]]:
    """The array without what is not finite, how many voxels were repaired, and what is to be said."""
    finite = np.isfinite(array)
    num_repaired = array.size - int(np.count_nonzero(finite))
    if num_repaired >= BACKGROUND_SHARE * array.size:
        outside = _background(array)
        if np.count_nonzero(outside) >= BACKGROUND_SHARE * array.size and finite.any():
            array, finite = np.where(outside, np.float32(0.0), array), finite | outside
            num_repaired, notes = array.size - int(np.count_nonzero(finite)), (*notes, Note.NAN_BACKGROUND)
    if num_repaired > MAXIMUM_NOT_FINITE * array.size:
        raise UnusableScan(Reason.NOT_FINITE, f"{num_repaired} of {array.size} voxels")
    if num_repaired:
        array = np.where(finite, array, array[finite].min())
    return array, num_repaired, notes


def _background(array: np.ndarray) -> np.ndarray:
    """The NaN voxels that are connected, face to face, with the border."""
    from scipy.ndimage import binary_propagation  # a tenth of a second, and few scans need it

    missing = np.isnan(array)
    border = np.ones_like(missing)
    border[1:-1, 1:-1, 1:-1] = False
    return np.asarray(binary_propagation(border & missing, mask=missing))


def is_hounsfield(array: Float32[np.ndarray, "x y z"]) -> bool:
    """Whether the values of a CT can be HU: some are below `BELOW_WATER_HU` (fat, lung, air), and few below
    `BELOW_AIR_HU` but for one value, which fills what was not measured."""
    below_water = np.count_nonzero(array < BELOW_WATER_HU)
    below_air = array[array < BELOW_AIR_HU]
    if below_air.size:
        below_air = below_air[below_air != below_air.min()]
    return bool(below_water >= FEW_VOXELS * array.size and below_air.size <= MANY_VOXELS * array.size)


def accept_label(array: Float32[np.ndarray, "x y z"], affine: Float64[np.ndarray, "4 4"]) -> Scan:
    """A label: integers that fit int16, constant or not; what is within `ROUNDED` of one becomes it.

    Anything else is `label_not_integer`, with values that were found.
    """
    check_affine(affine)
    limits = np.iinfo(np.int16)
    if not (np.isfinite(array).all() and array.min() >= limits.min and array.max() <= limits.max):
        raise UnusableScan(Reason.LABEL_NOT_INTEGER, f"values outside int16, {_values(array)}")
    rounded = np.rint(array)
    if (off := np.abs(array - rounded) > ROUNDED).any():
        raise UnusableScan(Reason.LABEL_NOT_INTEGER, f"fractions, {_values(array[off])}")
    return Scan(rounded, affine)


def _values(array: np.ndarray) -> str:
    values = np.unique(array)
    listed = ", ".join(f"{value:g}" for value in values[:VALUES_SHOWN])
    return f"e.g. {listed}" + (f", … {values[-1]:g}" if len(values) > VALUES_SHOWN else "")


def is_label_map(array: Float32[np.ndarray, "x y z"]) -> bool:
    """Whether a volume's values are those of a segmentation: integers, and few, or the same next door.

    Next door: along some axis, of the pairs of neighbours that are both not the commonest value, at least
    `ALIKE` are equal. Looked at: the middle block of `BLOCK` voxels along each axis; where that is of one
    value, everything.
    Measured: label maps of 1 to 145 regions .76 to 1.00; MR and CT, bytes included, 0 to .19.
    """
    middle = tuple(slice(max(0, (n - BLOCK) // 2), (n + BLOCK) // 2) for n in array.shape)
    return _is_segmented(array[middle], array) if np.ptp(array[middle]) else _is_segmented(array, array)


def _is_segmented(block: np.ndarray, array: np.ndarray) -> bool:
    if not np.array_equal(block, np.rint(block)):
        return False
    values, counts = _counted(block)
    if len(values) > MOST_REGIONS:
        return False
    few, alike = len(values) <= FEWEST_GREYS, _is_alike_next_door(block, values[counts.argmax()])
    if not (few or alike) or not np.array_equal(array, np.rint(array)):
        return False
    return alike or len(np.unique(array)) <= FEWEST_GREYS


def _counted(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a block of integers in ascending order, and how often each is there."""
    low, high = block.min(), block.max()
    if not (-(2**30) < low and high < 2**30 and high - low <= block.size):
        return np.unique(block, return_counts=True)
    counts = np.bincount((block.reshape(-1) - low).astype(np.int32))
    there = np.flatnonzero(counts)
    return there + low, counts[there]


def _is_alike_next_door(block: np.ndarray, background: np.floating) -> bool:
    for axis in range(3):
        ahead, behind = np.moveaxis(block, axis, 0)[1:], np.moveaxis(block, axis, 0)[:-1]
        inner = (ahead != background) & (behind != background)
        pairs, equal = np.count_nonzero(inner), np.count_nonzero(inner & (ahead == behind))
        if pairs and equal >= ALIKE * pairs:
            return True
    return False


_POINTERS = (b"version https://git-lfs.github.com/", b"/annex/objects/")
"""First bytes of the small texts that stand for files of Git LFS and of git-annex (unlocked)."""
FileKind = Literal["empty", "gzip", "nifti", "dicom", "other"]


def file_kind(path: Path) -> FileKind:
    """What a file is by its first bytes, whatever its name. Opens regular files only.

    Raises `UnusableScan`: unreadable, not a file, not fetched.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, for ever
            raise UnusableScan(Reason.NOT_A_FILE)
        with path.open("rb") as stream:
            head = stream.read(352)
    except OSError as error:
        raise UnusableScan(Reason.UNREADABLE, f"errno {error.errno}") from error
    if not head:
        return "empty"
    if head.startswith(_POINTERS):
        raise UnusableScan(Reason.NOT_FETCHED)
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if has_nifti_magic(head):
        return "nifti"
    return "dicom" if head[128:132] == b"DICM" or _is_bare_dicom(head) else "other"


def _is_bare_dicom(head: bytes) -> bool:
    """Whether these first bytes are DICOM without preamble: a first element of group 2 or 8, in either way of
    writing (PS3.5 7.1.2, 7.1.3), little endian."""
    if len(head) < 132 or head[:2] not in (b"\x02\x00", b"\x08\x00") or head[3] != 0:
        return False
    if head[4:6] in (b"UL", b"UI", b"CS", b"OB", b"SH", b"LO", b"DA", b"TM"):
        return True
    length = int.from_bytes(head[4:8], "little")
    return 0 < length <= 128 and length % 2 == 0


def has_nifti_magic(head: bytes) -> bool:
    """Whether these first bytes open a single-file NIfTI-1 or NIfTI-2."""
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"
