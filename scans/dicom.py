"""A DICOM series, of one file per slice or of enhanced files, as one array and one affine.

Every frame says where it lies (DICOM PS3.3 C.7.6.2: position and orientation of the patient, pixel spacing);
the positions, not the file names or instance numbers, make the volume. Which frames belong together is
`scans/stacks.py`'s. Slices that are sheared against each other, as a tilted gantry makes them, are
resampled to a straight stack. What cannot be a volume on a regular grid is refused by name: mosaics,
multi-frame files without positions, gaps.

Compressed pixels are decoded by pydicom (RLE) and pylibjpeg (JPEG, JPEG-LS, JPEG 2000).

Axes: x = columns of the image, y = rows, z = slices along row direction x column direction.
"""

import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float32, Float64
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from scans.frames import HEADER, Frame, frames_of
from scans.scans import (
    MINIMUM_SLICES,
    TILE,
    Exclusion,
    FourD,
    Note,
    Reason,
    UnusableScan,
    check_shape,
    combine,
    stacked,
)
from scans.stacks import Arranged, arrange, groups_of, is_misfit, misfit_of

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
REGULAR = 0.1
"""A slice may be off a regular grid by less than this share of the spacing: positions are often rounded to a
tenth of a millimetre."""
SAID = 0.02
"""From this share on (and 0.01 mm, what decimal strings round to) that is said."""
TILT = 0.01
"""Sine of the angle between the stacking direction and the slice normal from which on slices are shifted:
0.6 degrees."""
LARGEST_TILT_DEGREES = 45.0
"""Beyond, slices are not a stack that was tilted. A gantry tilts by 30 degrees at most."""
GAPS_SHOWN = 4
PARSING_ERRORS = (
    InvalidDicomError, BytesLengthException, EOFError, ValueError, TypeError, KeyError, AttributeError,
    IndexError, OverflowError, NotImplementedError, RuntimeError, struct.error,
)  # fmt: skip
"""What pydicom raises on a file that is not what it says."""
_NAMES = ("SeriesDescription", "ProtocolName", "Modality")
_PERSON = (
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyInstanceUID",
)
_PARTS = {
    "P": "phase", "PHASE": "phase", "PHASE MAP": "phase", "R": "real", "REAL": "real", "I": "imag",
    "IMAGINARY": "imag",
}  # fmt: skip
"""What image types and ComplexImageComponent of MR say of the part of a complex signal."""


@dataclass(frozen=True)
class Series:
    """The files of one volume, or of volumes over time, and what the site's tables need of their headers."""

    files: tuple[Path, ...]
    patient: str
    """PatientID; empty when there is none."""
    names: tuple[str, ...]
    """What the scan may be called, most specific first: series description, protocol, modality. With
    `part-phase_` (`real`, `imag`) before each for parts of a complex signal, and `echo-2_` where one series
    has several echoes, as BIDS would call them."""
    uid: str
    instances: frozenset[str]
    """SOP instance UIDs."""
    issuer: str = ""
    """Who gave the PatientID, where the header says."""
    born: str = ""
    """PatientBirthDate, as written."""
    sex: str = ""
    """PatientSex, as written."""
    study: str = ""
    """StudyDate, else StudyInstanceUID."""


@dataclass
class _Member:
    """A file of a series: its frames, or why it has none."""

    path: Path
    instance: str
    header: Dataset
    frames: list[Frame]
    misfit: UnusableScan | None


def find_series(files: Sequence[Path]) -> tuple[list[Series], list[Exclusion]]:
    """Group DICOM files by folder and SeriesInstanceUID, and these into volumes; reads headers only, and
    pixels where two frames lie at one place.

    Returns the series, in the order of their first file, and the files that belong to none, each with its
    reason: unreadable headers, a DICOMDIR, objects without pixels; and of series that go on without them,
    localizers, secondary captures, duplicates, a few frames of another kind.
    """
    groups: dict[tuple[Path, str], list[_Member]] = defaultdict(list)
    left_over: list[Exclusion] = []
    for path in files:
        try:
            header = _header(path, ["SeriesInstanceUID", "SOPInstanceUID", *_PERSON, *_NAMES, *HEADER])
            uid, instance = str(header.SeriesInstanceUID), str(header.SOPInstanceUID)
        except UnusableScan as error:
            sidecar = error.reason is Reason.CORRUPT and path.name == "DICOMDIR"
            left_over.append(Exclusion(path, Reason.SIDECAR if sidecar else error.reason))
            continue
        except AttributeError:
            if path.name == "DICOMDIR":
                left_over.append(Exclusion(path, Reason.SIDECAR))
            else:
                left_over.append(Exclusion(path, Reason.CORRUPT, "no SeriesInstanceUID or SOPInstanceUID"))
            continue
        if "Rows" not in header:
            left_over.append(Exclusion(path, Reason.NOT_AN_IMAGE))
            continue
        member = _Member(path, instance, header, [], None)
        try:
            member.frames = _frames(path, header)
        except UnusableScan as error:
            member.misfit = error
        groups[path.parent, uid].append(member)
    found: list[Series] = []
    for (_, uid), members in groups.items():
        volumes, misfits = _volumes(members)
        found += _named(uid, volumes)
        left_over += misfits
    order = {path: place for place, path in enumerate(files)}
    return sorted(found, key=lambda series: order[series.files[0]]), left_over


def _volumes(members: list[_Member]) -> tuple[list[list[_Member]], list[Exclusion]]:
    """The members of each volume of one series, and those that are of none.

    A series of which nothing is a volume stays whole, and is refused when it is read.
    """
    good = [member for member in members if member.frames]
    if not good:
        return [members], []
    by_path = {member.path: member for member in good}
    groups = groups_of([frame for member in good for frame in member.frames])
    owners = [{frame.path for frame in frames} for frames, _ in groups]
    misfits = [Exclusion(m.path, m.misfit.reason, m.misfit.detail) for m in members if m.misfit]
    if len(groups) > 1 and len(groups[0][0]) < MINIMUM_SLICES:
        return [good], misfits
    torn = {path for path in by_path if sum(path in paths for paths in owners) > 1}  # enhanced, several kinds
    volumes = [[by_path[path]] for path in by_path if path in torn]
    small = []
    for frames, attribute in groups:
        frames = [frame for frame in frames if frame.path not in torn]
        if frames and attribute and is_misfit(frames, attribute, groups[0][0]):
            small.append((frames, misfit_of(attribute, frames)))
        elif frames:
            try:
                arranged = arrange(frames)
            except UnusableScan:
                arranged = Arranged([frames])
            kept = {frame.path for position in arranged.stack for frame in position}
            again = dict.fromkeys(f.path for f in arranged.duplicates if f.path not in kept)
            misfits += [Exclusion(path, Reason.DUPLICATE, "the same pixels again") for path in again]
            volumes.append([by_path[path] for path in by_path if path in kept])
    misfits += [Exclusion(f.path, error.reason, error.detail) for frames, error in small for f in frames]
    return volumes, misfits


def _named(uid: str, volumes: Sequence[Sequence[_Member]]) -> list[Series]:
    """Series of the volumes of one SeriesInstanceUID."""
    echoes = sorted({echo for members in volumes if (echo := _echo(members)) is not None})
    found = []
    for members in volumes:
        header = members[0].header
        called = [str(header.get(tag)) for tag in _NAMES if header.get(tag)]
        if part := _part(members):
            called = [f"part-{part}_{name}" for name in called] or [f"part-{part}"]
        if len(echoes) > 1 and (echo := _echo(members)) is not None:
            called = [f"echo-{echoes.index(echo) + 1}_{name}" for name in called]
        patient, issuer, born, sex, *study = (str(header.get(tag) or "").strip() for tag in _PERSON)
        instances = frozenset(member.instance for member in members)
        files = tuple(member.path for member in members)
        found.append(
            Series(files, patient, tuple(called), uid, instances, issuer, born, sex,
                   next(filter(None, study), ""))
        )  # fmt: skip
    return found


def _echo(members: Sequence[_Member]) -> float | None:
    frames = members[0].frames
    echo = frames[0].kinds["EchoTime"] if frames else None
    if echo is None and frames:
        echo = frames[0].kinds["EchoNumbers"]
    return echo if isinstance(echo, float) else None


def _part(members: Sequence[_Member]) -> str:
    """Which part of a complex signal an MR volume is; empty for the magnitude."""
    frames = members[0].frames
    if not frames or frames[0].kinds["Modality"] != "MR":
        return ""
    kinds = frames[0].kinds
    words = kinds["ImageType"] if isinstance(kinds["ImageType"], tuple) else ()
    kinds_said = [str(kinds["ComplexImageComponent"] or ""), *map(str, words[2:])]
    return next((_PARTS[word] for word in kinds_said if word in _PARTS), "")


def read_series(
    files: Sequence[Path], four_d: FourD
) -> tuple[Float32[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"], int, tuple[Note, ...]]:
    """Values with slope and intercept applied (HU for CT), affine (RAS+ mm), number of volumes, and what a
    person should look at.

    Raises `UnusableScan` with the reason. Refusals that need only headers come before any pixel is decoded.
    """
    frames = [frame for path in files for frame in _frames(path, _header(path))]
    groups = groups_of(frames)
    if len(groups) > 1:
        members, attribute = groups[1]
        raise misfit_of(attribute, members)
    if len(frames) < MINIMUM_SLICES:
        raise UnusableScan(Reason.TOO_FEW_SLICES, f"{len(frames)} frames, at least {MINIMUM_SLICES}")
    arranged = arrange(frames)
    stack, notes = arranged.stack, arranged.notes
    if len(stack) < MINIMUM_SLICES:
        raise UnusableScan(Reason.TOO_FEW_SLICES, f"{len(stack)} positions, at least {MINIMUM_SLICES}")
    rows, columns = stack[0][0].size
    _, num_volumes = check_shape((columns, rows, len(stack), len(stack[0])), four_d)
    step, rounded = _step([position[0] for position in stack])
    notes += (Note.ROUNDED_POSITIONS,) * rounded + (Note.INVERTED,) * frames[0].inverted
    affine = np.eye(4)
    first = stack[0][0]
    affine[:3, 0] = first.directions[0] * first.spacing[1]  # PS3.3 equation C.7.6.2.1-1
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, first.position

    def volumes() -> Iterator[np.ndarray]:
        for time in range(num_volumes):
            slabs = (
                np.stack([_pixels(position[time]) for position in stack[z : z + TILE[1]]], axis=-1)  # x y z
                for z in range(0, len(stack), TILE[1])
            )
            yield stacked(slabs, (columns, rows, len(stack)))

    if not _is_tilted(affine):
        return combine(volumes(), four_d), LPS_TO_RAS @ affine, num_volumes, notes
    check_shape((*_straightened_shape((columns, rows, len(stack)), affine), num_volumes), four_d)
    array, affine = straighten(combine(volumes(), four_d), affine)
    return array, LPS_TO_RAS @ affine, num_volumes, (*notes, Note.TILTED)


def _header(path: Path, tags: Sequence[str] | None = None) -> Dataset:
    """A header without pixels; of `tags` alone, and these read here: pydicom reads a value when it is asked
    for, and may then find that it cannot."""
    try:  # force: without preamble, which `file_kind` has looked for
        header = pydicom.dcmread(
            path, stop_before_pixels=True, force=True, specific_tags=None if tags is None else list(tags)
        )
        for tag in () if tags is None else list(header.keys()):
            header[tag]
        return header
    except OSError as error:
        raise UnusableScan(Reason.UNREADABLE, f"errno {error.errno}") from error
    except PARSING_ERRORS as error:
        raise UnusableScan(Reason.CORRUPT, "the header cannot be parsed") from error


def _frames(path: Path, header: Dataset) -> list[Frame]:
    """The frames of one file with their places, from its header alone."""
    try:
        return frames_of(path, header)
    except UnusableScan:
        raise
    except PARSING_ERRORS as error:
        raise UnusableScan(Reason.CORRUPT, "the header cannot be parsed") from error


def _step(slices: Sequence[Frame]) -> tuple[Float64[np.ndarray, "3"], bool]:
    """From slice to slice, mm, of the regular grid nearest to the slices, and whether they are off it by more
    than decimal strings round to. Refuses gaps, by their places."""
    normal = np.cross(*slices[0].directions)
    places = np.array([frame.position for frame in slices])
    gaps_mm = np.diff(places @ normal)
    typical_mm = float(np.median(gaps_mm))
    ends = (places[-1] - places[0]) / (len(slices) - 1)
    counted = np.arange(len(slices)) - (len(slices) - 1) / 2
    fitted = counted @ (places - places.mean(axis=0)) / (counted @ counted)
    off_mm = np.linalg.norm(places - places.mean(axis=0) - counted[:, None] * fitted, axis=1).max()
    if off_mm < REGULAR * typical_mm:
        rounded = bool(off_mm > SAID * typical_mm + 0.01)
        return (fitted if rounded else ends), rounded
    wide = [i for i, gap in enumerate(gaps_mm) if abs(gap - typical_mm) > REGULAR * typical_mm]
    if not wide:
        raise UnusableScan(Reason.UNEVEN_SLICES, f"{off_mm:.3f} mm off a grid of {typical_mm:.3f} mm")
    wide_gaps = ", ".join(f"{gaps_mm[i]:.3f} mm after slice {i + 1}" for i in wide[:GAPS_SHOWN])
    more = f" and {len(wide) - GAPS_SHOWN} more" if len(wide) > GAPS_SHOWN else ""
    raise UnusableScan(Reason.UNEVEN_SLICES, f"gaps of {wide_gaps}{more}; {typical_mm:.3f} mm elsewhere")


def _is_tilted(affine: Float64[np.ndarray, "4 4"]) -> bool:
    """Whether the slices are shifted against each other; refuses what no gantry does."""
    normal, step = np.cross(affine[:3, 0], affine[:3, 1]), affine[:3, 2]
    if not np.linalg.norm(normal):
        return False  # the affine's own check has the word
    cosine = float(step @ normal / np.linalg.norm(normal) / np.linalg.norm(step))
    degrees = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
    if degrees > LARGEST_TILT_DEGREES:
        raise UnusableScan(Reason.GANTRY_TILT, f"{degrees:.1f} degrees, at most {LARGEST_TILT_DEGREES:.0f}")
    return math.sin(math.radians(degrees)) > TILT


def _shifts(count: int, affine: Float64[np.ndarray, "4 4"]) -> list[np.ndarray]:
    """By how many voxels each slice lies further along x, and along y, than the first."""
    edges = [affine[:3, axis] / (affine[:3, axis] @ affine[:3, axis]) for axis in (0, 1)]
    return [np.arange(count) * float(affine[:3, 2] @ edge) for edge in edges]


def _straightened_shape(shape: tuple[int, int, int], affine: np.ndarray) -> tuple[int, int, int]:
    first, last = zip(*[_reach(shifts) for shifts in _shifts(shape[2], affine)], strict=True)
    return shape[0] + last[0] - first[0], shape[1] + last[1] - first[1], shape[2]


def _reach(shifts: np.ndarray) -> tuple[int, int]:
    return math.floor(shifts.min() + 1e-6), math.ceil(shifts.max() - 1e-6)


def straighten(
    array: Float32[np.ndarray, "x y z"], affine: Float64[np.ndarray, "4 4"]
) -> tuple[Float32[np.ndarray, "X Y z"], Float64[np.ndarray, "4 4"]]:
    """A sheared stack on a grid with perpendicular axes that holds all of it.

    Each slice is shifted within its own plane, by a cubic spline, which keeps noise and edges; no slice is
    mixed with another. Where nothing was measured lies the lowest value of the scan.
    """
    from scipy.ndimage import shift  # few series need it

    shifts = _shifts(array.shape[2], affine)
    first = [_reach(one)[0] for one in shifts]
    low, high = array.min(), array.max()
    straight = np.full(_straightened_shape(array.shape, affine), low, np.float32)
    for z in range(array.shape[2]):
        straight[: array.shape[0], : array.shape[1], z] = array[:, :, z]
        by = [shifts[axis][z] - first[axis] for axis in (0, 1)]
        straight[:, :, z] = shift(straight[:, :, z], by, np.float32, order=3, mode="constant", cval=low)
    np.clip(straight, low, high, out=straight)  # a cubic overshoots at edges
    moved = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    moved[:3, 2] = normal * (affine[:3, 2] @ normal)
    moved[:3, 3] = affine[:3, 3] + affine[:3, 0] * first[0] + affine[:3, 1] * first[1]
    return straight, moved


def _pixels(frame: Frame) -> np.ndarray:
    """One frame, columns first, in the units of its slope and intercept."""
    try:
        values = _decoded(frame).T  # x y
    except OSError as error:
        raise UnusableScan(Reason.UNREADABLE, f"errno {error.errno}") from error
    except (NotImplementedError, RuntimeError) as error:
        raise UnusableScan(Reason.COMPRESSED_UNSUPPORTED) from error
    except PARSING_ERRORS as error:
        raise UnusableScan(Reason.TRUNCATED, "fewer pixels than the header promises") from error
    if values.shape != frame.size[::-1]:
        raise UnusableScan(Reason.CORRUPT, "the pixels have another shape than the header")
    return np.asarray(values * np.float64(frame.slope) + np.float64(frame.intercept), dtype=np.float32)


def _decoded(frame: Frame) -> np.ndarray:
    with frame.path.open("rb") as stream:
        bare = stream.read(132)[128:] != b"DICM"
    if not bare:
        return np.asarray(pixel_array(frame.path, index=frame.index))
    whole = pydicom.dcmread(frame.path, force=True)  # without preamble, mostly without a transfer syntax
    if "TransferSyntaxUID" not in whole.file_meta:
        implicit, little = whole.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        whole.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return np.asarray(pixel_array(whole, index=frame.index))
