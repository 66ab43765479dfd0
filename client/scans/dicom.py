"""A DICOM series, of one file per slice or of one enhanced file, as one array and one affine.

Every frame says where it lies (DICOM PS3.3 C.7.6.2: position and orientation of the patient, pixel spacing);
frames are sorted by their projection on the slice normal, and the positions, not the file names or instance
numbers, make the volume. Several frames at every position make it 4-D. What cannot be a volume on a regular
grid is refused by name: mosaics, multi-frame files without positions, mixed orientations, gaps, tilted
gantries.

Compressed pixels are decoded by pydicom (RLE) and pylibjpeg (JPEG, JPEG-LS, JPEG 2000).

Axes: x = columns of the image, y = rows, z = slices along row direction x column direction.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float32, Float64
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels import pixel_array

from client.scans.scans import MINIMUM_SLICES, FourD, Reason, UnusableScan, check_shape, combine

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
EVEN = 0.02
"""A slice may be off by this share of the spacing (and 0.01 mm, what decimal strings round to)."""
TILT = 0.01
"""Largest sine of the angle between the stacking direction and the slice normal: 0.6 degrees."""
ALIGNED = 1e-3
"""Largest difference of direction cosines between two slices of one stack."""
PARSING_ERRORS = (
    InvalidDicomError, BytesLengthException, EOFError, ValueError, TypeError, KeyError, AttributeError,
    IndexError, OverflowError, NotImplementedError, RuntimeError, struct.error,
)  # fmt: skip
"""What pydicom raises on a file that is not what it says."""


@dataclass(frozen=True)
class Series:
    """The files of one series in one folder, and what the site's tables need of their headers."""

    files: tuple[Path, ...]
    patient: str
    """PatientID; empty when there is none."""
    names: tuple[str, ...]
    """What the scan may be called, most specific first: series description, protocol, modality."""
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


@dataclass(frozen=True)
class _Frame:
    path: Path
    index: int  # within the file
    order: tuple[int, int]
    size: tuple[int, int]  # rows, columns
    position: np.ndarray  # mm, LPS
    directions: np.ndarray  # of increasing column, of increasing row
    spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float


def find_series(files: Sequence[Path]) -> tuple[list[Series], list[tuple[Path, Reason]]]:
    """Group DICOM files into series by folder and SeriesInstanceUID; reads headers only.

    Returns the series, in the order of their first file, and the files that belong to none, each with its
    reason: unreadable headers, a DICOMDIR, objects without pixels, a second copy of the same instance.
    """
    names = ("SeriesDescription", "ProtocolName", "Modality")  # most specific first
    person = [
        "PatientID",
        "IssuerOfPatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyInstanceUID",
    ]
    tags = ["SeriesInstanceUID", "SOPInstanceUID", "Rows", *person, *names]
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    headers: dict[tuple[Path, str], Dataset] = {}
    left_over = []
    for path in files:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            key, instance = (path.parent, str(header.SeriesInstanceUID)), str(header.SOPInstanceUID)
        except OSError:
            left_over.append((path, Reason.UNREADABLE))
            continue
        except PARSING_ERRORS:
            left_over.append((path, Reason.SIDECAR if path.name == "DICOMDIR" else Reason.CORRUPT))
            continue
        if "Rows" not in header:
            left_over.append((path, Reason.NOT_AN_IMAGE))
        elif instance in groups.setdefault(key, {}):
            left_over.append((path, Reason.DUPLICATE))
        else:
            groups[key][instance] = path
            headers.setdefault(key, header)
    found = []
    for key, members in groups.items():
        header = headers[key]
        called = tuple(str(header.get(tag)) for tag in names if header.get(tag))
        patient, issuer, born, sex, *study = (str(header.get(tag) or "").strip() for tag in person)
        found.append(
            Series(
                tuple(members.values()), patient, called, key[1], frozenset(members), issuer, born, sex,
                next(filter(None, study), ""),
            )
        )  # fmt: skip
    return found, left_over


def read_series(
    files: Sequence[Path], four_d: FourD
) -> tuple[Float32[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"], int]:
    """Values with slope and intercept applied (HU for CT), affine (RAS+ mm), and number of volumes.

    Raises `UnusableScan` with the reason. Refusals that need only headers come before any pixel is decoded.
    """
    frames = [frame for path in files for frame in _frames(path)]
    if any(np.abs(frame.directions - frames[0].directions).max() > ALIGNED for frame in frames):
        raise UnusableScan(Reason.MIXED_ORIENTATION, f"{len(frames)} frames")
    if len({frame.size for frame in frames}) > 1 or not np.allclose(
        [frame.spacing for frame in frames], frames[0].spacing, rtol=1e-3, atol=0.0
    ):
        raise UnusableScan(Reason.MIXED_SIZES, f"{len(frames)} frames")
    stack = _stack(frames)
    rows, columns = frames[0].size
    _, num_volumes = check_shape((columns, rows, len(stack), len(stack[0])), four_d)
    affine = _affine(stack)

    def volumes() -> Iterator[np.ndarray]:
        for time in range(num_volumes):
            yield np.stack([_pixels(position[time]) for position in stack], axis=-1)  # x y z

    return combine(volumes(), four_d), affine, num_volumes


def _frames(path: Path) -> list[_Frame]:
    """The frames of one file with their places, from its header alone."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        return _parse(path, header)
    except OSError as error:
        raise UnusableScan(Reason.UNREADABLE, f"errno {error.errno}") from error
    except UnusableScan:
        raise
    except PARSING_ERRORS as error:
        raise UnusableScan(Reason.CORRUPT, "the header cannot be parsed") from error


def _parse(path: Path, header: Dataset) -> list[_Frame]:
    if "MOSAIC" in header.get("ImageType", []):
        raise UnusableScan(Reason.MOSAIC)
    if "Rows" not in header or "Columns" not in header:
        raise UnusableScan(Reason.NOT_AN_IMAGE)
    if header.get("SamplesPerPixel", 1) != 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise UnusableScan(Reason.RGB)
    number = int(header.get("InstanceNumber") or 0)
    if "PerFrameFunctionalGroupsSequence" in header:
        shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
        groups = header.PerFrameFunctionalGroupsSequence
        places = [_functional_groups(frame, shared[0]) for frame in groups]
    elif int(header.get("NumberOfFrames") or 1) > 1:
        raise UnusableScan(Reason.MULTIFRAME, f"{int(header.NumberOfFrames)} frames without positions")
    else:
        places = [header]
    frames = []
    for index, place in enumerate(places):
        missing = [
            tag
            for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
            if not place.get(tag)
        ]
        if missing:
            raise UnusableScan(Reason.NO_ORIENTATION, f"{len(missing)} of 3 geometry fields missing")
        slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
        directions = _numbers(place.ImageOrientationPatient, 6).reshape(2, 3)
        spacing = _numbers(place.PixelSpacing, 2)
        frames.append(
            _Frame(
                path=path,
                index=index,
                order=(number, index),
                size=(int(header.Rows), int(header.Columns)),
                position=_numbers(place.ImagePositionPatient, 3),
                directions=directions,
                spacing=(float(spacing[0]), float(spacing[1])),
                slope=1.0 if slope is None else float(slope),
                intercept=0.0 if intercept is None else float(intercept),
            )
        )
    return frames


def _functional_groups(frame: Dataset, shared: Dataset) -> Dataset:
    """One frame's place and scale, flattened: its own functional groups before the shared ones."""
    place = Dataset()
    for group in ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation"):
        sequence = frame.get(f"{group}Sequence") or shared.get(f"{group}Sequence")
        if sequence:
            place.update(sequence[0])
    return place


def _numbers(values: Sequence[object], count: int) -> np.ndarray:
    numbers = np.array([float(str(value)) for value in values])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise UnusableScan(Reason.CORRUPT, "geometry is not numbers")
    return numbers


def _stack(frames: Sequence[_Frame]) -> list[list[_Frame]]:
    """Frames by position along the normal, then by time; refuses gaps and tilts."""
    normal = np.cross(*frames[0].directions)
    if not 0.99 < np.linalg.norm(normal) < 1.01:
        raise UnusableScan(Reason.SINGULAR_AFFINE, "rows and columns are not perpendicular")
    along = {id(frame): float(normal @ frame.position) for frame in frames}
    stack: list[list[_Frame]] = []
    for frame in sorted(frames, key=lambda f: along[id(f)]):
        if stack and along[id(frame)] - along[id(stack[-1][0])] < 0.01:
            stack[-1].append(frame)
        else:
            stack.append([frame])
    if len(stack) < MINIMUM_SLICES:
        raise UnusableScan(Reason.TOO_FEW_SLICES, f"{len(stack)} positions, at least {MINIMUM_SLICES}")
    if len({len(position) for position in stack}) > 1:
        raise UnusableScan(Reason.UNEVEN_SLICES, f"{len(frames)} frames at {len(stack)} positions")
    gaps_mm = np.array([along[id(b[0])] - along[id(a[0])] for a, b in pairwise(stack)])
    typical_mm = float(np.median(gaps_mm))
    if np.abs(gaps_mm - typical_mm).max() > EVEN * typical_mm + 0.01:
        raise UnusableScan(Reason.UNEVEN_SLICES, f"gaps of {gaps_mm.min():.3f} to {gaps_mm.max():.3f} mm")
    run = stack[-1][0].position - stack[0][0].position
    tilt = float(np.linalg.norm(run - (run @ normal) * normal) / np.linalg.norm(run))
    if tilt > TILT:
        raise UnusableScan(Reason.GANTRY_TILT, f"{np.degrees(np.arcsin(min(tilt, 1.0))):.1f} degrees")
    return [sorted(position, key=lambda f: f.order) for position in stack]


def _affine(stack: Sequence[Sequence[_Frame]]) -> Float64[np.ndarray, "4 4"]:
    """Voxel indices (column, row, slice) to RAS+ mm; PS3.3 equation C.7.6.2.1-1."""
    first, last = stack[0][0], stack[-1][0]
    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * first.spacing[1]
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2] = (last.position - first.position) / (len(stack) - 1)
    affine[:3, 3] = first.position
    return LPS_TO_RAS @ affine


def _pixels(frame: _Frame) -> np.ndarray:
    """One frame, columns first, in the units of its slope and intercept."""
    try:
        values = pixel_array(frame.path, index=frame.index).T  # x y
    except OSError as error:
        raise UnusableScan(Reason.UNREADABLE, f"errno {error.errno}") from error
    except (NotImplementedError, RuntimeError) as error:
        raise UnusableScan(Reason.COMPRESSED_UNSUPPORTED) from error
    except PARSING_ERRORS as error:
        raise UnusableScan(Reason.TRUNCATED, "fewer pixels than the header promises") from error
    if values.shape != frame.size[::-1]:
        raise UnusableScan(Reason.CORRUPT, "the pixels have another shape than the header")
    return np.asarray(values * np.float64(frame.slope) + np.float64(frame.intercept), dtype=np.float32)
