"""The frames of a DICOM series: where each lies and what it is, by its header.

An enhanced object says all this per frame, by its functional groups and dimension indices (DICOM PS3.3
C.7.6.16, C.7.6.17); other objects once per file. What is no slice of a volume is refused by name: mosaics,
localizers, screenshots, multi-frame files without places.

Does not do: say which frames belong together (`scans/stacks.py`); read pixels.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset

from scans.scans import Reason, UnusableScan

PERSON = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex")
SETTINGS = ("EchoTime", "InversionTime", "FlipAngle", "KVP")
"""Numbers that may differ by a rounding from slice to slice."""
KINDS = (*PERSON, "SOPClassUID", "Modality", "ImageType", "ComplexImageComponent", "EchoNumbers",
         "ConvolutionKernel", *SETTINGS)  # fmt: skip
"""Attributes in which the frames of one volume do not differ."""
TIMES = ("TemporalPositionIdentifier", "TemporalPositionIndex", "Diffusion", "AcquisitionNumber",
         "TriggerTime", "NominalPercentageOfCardiacPhase")  # fmt: skip
"""Attributes that tell volumes of one series apart."""
CLOCKS = ("AcquisitionDateTime", "AcquisitionTime", "ContentTime")
"""The same, where nothing else does and the pixels differ."""
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_DIFFUSION = ("DiffusionBValue", "DiffusionGradientOrientation")
_PLACES = frozenset({"StackID", "InStackPositionNumber", "ImagePositionPatient", "PlanePositionSequence"})
"""Dimensions of an enhanced object that say where, not when."""
_GROUPS = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation", "FrameContent",
           "MREcho", "MRTimingAndRelatedParameters", "MRModifier", "MRImageFrameType", "CTImageFrameType",
           "CTReconstruction", "CTXRayDetails", "MRDiffusion", "CardiacSynchronization")  # fmt: skip
_ENHANCED = {
    "EchoTime": "EffectiveEchoTime",
    "ImageType": "FrameType",
    "AcquisitionNumber": "FrameAcquisitionNumber",
    "TriggerTime": "NominalCardiacTriggerDelayTime",
    "InversionTime": "InversionTimes",
}
"""What an enhanced object calls an attribute."""
HEADER = (*KINDS, *TIMES[:2], *TIMES[3:], *CLOCKS, *_GEOMETRY, *_DIFFUSION, "FrameOfReferenceUID", "Rows",
          "Columns", "SamplesPerPixel", "PhotometricInterpretation", "InstanceNumber", "NumberOfFrames",
          "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
          "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence")  # fmt: skip
"""Attributes that `frames_of` reads."""
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture; its multi-frame kinds continue it."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice."""

    path: Path
    index: int
    """Within the file."""
    number: int | None
    """InstanceNumber."""
    size: tuple[int, int]
    """Rows, columns."""
    position: np.ndarray
    """mm, LPS."""
    directions: np.ndarray
    """Of increasing column, of increasing row."""
    spacing: tuple[float, float]
    """Between rows, between columns; mm."""
    slope: float
    intercept: float
    rescaled: bool
    """Whether the header says slope or intercept."""
    inverted: bool
    """Whether the lowest value is the brightest (MONOCHROME1)."""
    kinds: Mapping[str, Hashable]
    times: Mapping[str, Hashable]
    frame_of_reference: str


def frames_of(path: Path, header: Dataset) -> list[Frame]:
    """The frames of one file, from its header. Raises `UnusableScan` for what is no slice of a volume."""
    kind = _words(header.get("ImageType"))
    if "MOSAIC" in kind:
        raise UnusableScan(Reason.MOSAIC)
    if "LOCALIZER" in kind:
        raise UnusableScan(Reason.LOCALIZER)
    if "Rows" not in header or "Columns" not in header:
        raise UnusableScan(Reason.NOT_AN_IMAGE)
    enhanced = "PerFrameFunctionalGroupsSequence" in header
    if not enhanced and is_secondary(header) and not all(header.get(tag) for tag in _GEOMETRY):
        raise UnusableScan(Reason.SECONDARY_CAPTURE)
    if header.get("SamplesPerPixel", 1) != 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise UnusableScan(Reason.RGB)
    if enhanced:
        shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
        dimensions = [_pointer(one) for one in header.get("DimensionIndexSequence") or []]
        places = [_flat(group, shared[0], dimensions) for group in header.PerFrameFunctionalGroupsSequence]
        if len(places) != int(header.get("NumberOfFrames") or len(places)):
            raise UnusableScan(Reason.CORRUPT, "another number of frames than of their places")
    elif int(header.get("NumberOfFrames") or 1) > 1:
        raise UnusableScan(Reason.MULTIFRAME, f"{int(header.NumberOfFrames)} frames without positions")
    else:
        places = [(header, {})]
    return [_frame(path, index, header, *place) for index, place in enumerate(places)]


def is_secondary(header: Dataset) -> bool:
    """Whether the object is a screenshot or another secondary capture by its class."""
    return str(header.get("SOPClassUID") or "").startswith(SECONDARY)


def _pointer(dimension: Dataset) -> str:
    pointer = dimension.get("DimensionIndexPointer")
    return (keyword_for_tag(pointer) or str(pointer)) if pointer is not None else ""


def _flat(frame: Dataset, shared: Dataset, dimensions: Sequence[str]) -> tuple[Dataset, dict[str, Hashable]]:
    """One frame's attributes, flattened (its own functional groups before the shared ones), and its index in
    every dimension that says when."""
    place = Dataset()
    for group in _GROUPS:
        for source in (shared, frame):
            if sequence := source.get(f"{group}Sequence"):
                place.update(sequence[0])
    if direction := place.get("DiffusionGradientDirectionSequence"):
        place.update(direction[0])
    values = place.get("DimensionIndexValues") or []
    values = [values] if isinstance(values, int) else list(values)
    if dimensions and len(dimensions) == len(values):
        by_dimension = {
            name: float(v) for name, v in zip(dimensions, values, strict=True) if name not in _PLACES
        }
    else:
        by_dimension = {}
    return place, {f"dimension {name}": value for name, value in by_dimension.items()}


def _frame(
    path: Path, index: int, header: Dataset, place: Dataset, dimensions: Mapping[str, Hashable]
) -> Frame:
    missing = [tag for tag in _GEOMETRY if not place.get(tag)]
    if missing:
        raise UnusableScan(Reason.NO_ORIENTATION, f"{len(missing)} of 3 geometry fields missing")
    slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
    spacing = _numbers(place.PixelSpacing, 2)
    number = header.get("InstanceNumber")
    times: dict[str, Hashable] = {tag: _told(tag, place, header) for tag in (*TIMES, *CLOCKS)}
    times["Diffusion"] = tuple(_told(tag, place, header) for tag in _DIFFUSION)
    return Frame(
        path=path,
        index=index,
        number=None if number is None else int(number),
        size=(int(header.Rows), int(header.Columns)),
        position=_numbers(place.ImagePositionPatient, 3),
        directions=_numbers(place.ImageOrientationPatient, 6).reshape(2, 3),
        spacing=(float(spacing[0]), float(spacing[1])),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        rescaled=slope is not None or intercept is not None,
        inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
        kinds={tag: _told(tag, place, header) for tag in KINDS},
        times={**times, **dimensions},
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
    )


def _told(tag: str, place: Dataset, header: Dataset) -> Hashable:
    """An attribute's value: the frame's own before the file's; None where nothing says."""
    for source, name in ((place, _ENHANCED.get(tag, tag)), (place, tag), (header, tag)):
        if (value := source.get(name)) is not None and value != "":
            return tuple(_words(value)) if tag == "ImageType" else _plain(value)
    return None


def _plain(value: object) -> Hashable:
    if isinstance(value, (list, tuple, pydicom.multival.MultiValue)):
        return tuple(_plain(one) for one in value)
    return float(value) if isinstance(value, (int, float)) else str(value).strip()


def _words(value: object) -> list[str]:
    several = value if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]
    return [str(one).strip().upper() for one in several if one is not None]


def _numbers(values: Sequence[object], count: int) -> np.ndarray:
    several = [values] if isinstance(values, (int, float, str)) else values
    numbers = np.array([float(str(value)) for value in several])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise UnusableScan(Reason.CORRUPT, "geometry is not numbers")
    return numbers
