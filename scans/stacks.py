"""Which frames of a DICOM series make one volume, and in which order.

Frames of one volume share patient, kind of object, image type, echo, inversion, flip angle, kernel, tube
voltage (`KINDS`), orientation and size; what differs in one of these is another volume, never the next slice.
Several frames at one position are volumes of one series over time where an attribute says which is which
(`TIMES`), and where all attributes that say so agree; the same pixels again are a duplicate. `InstanceNumber`
decides only where it and the positions run in whole, even blocks. Everything else is ambiguous, and refused
with the attribute's name.

Does not do: read headers (`scans/frames.py`), or pixels beyond their hash; the grid
(`scans/dicom.py`).
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pydicom

from scans.frames import CLOCKS, KINDS, PERSON, SECONDARY, SETTINGS, TIMES, Frame
from scans.scans import MINIMUM_SLICES, Note, Reason, UnusableScan

ALIGNED = 1e-3
"""Largest difference of direction cosines between two slices of one stack."""
SAME_PLACE_MM = 0.01
"""Largest distance of frames at one position: what decimal strings round to."""
SAME_VALUE = 0.01
"""Largest relative difference of one echo time (inversion, angle) between the slices of one volume."""


@dataclass(frozen=True)
class Arranged:
    """Frames by position along the normal, then by time."""

    stack: list[list[Frame]]
    duplicates: tuple[Frame, ...] = ()
    notes: tuple[Note, ...] = ()


def groups_of(frames: Sequence[Frame]) -> list[tuple[list[Frame], str]]:
    """The frames of each volume or series of volumes, largest group first, each with the attribute in which
    it differs from the largest ("" for the largest itself)."""
    keys = [_key(frames, tag) for tag in KINDS]
    keys.append(_clusters([frame.directions for frame in frames], ALIGNED, 0.0))
    keys.append([frame.size for frame in frames])
    keys.append(_clusters([np.array(frame.spacing) for frame in frames], 0.0, 1e-3))
    references: list[Hashable] = [frame.frame_of_reference for frame in frames]
    if min(Counter(references).values()) >= MINIMUM_SLICES:  # else each file was given its own by mistake
        keys.append(references)
    names = (*KINDS, "ImageOrientationPatient", "Rows and Columns", "PixelSpacing", "FrameOfReferenceUID")
    found: dict[tuple[Hashable, ...], list[Frame]] = defaultdict(list)
    for frame, key in zip(frames, zip(*keys, strict=True), strict=True):
        found[key].append(frame)
    by_size = sorted(found.items(), key=lambda item: -len(item[1]))
    largest = by_size[0][0]
    first = ("ImageOrientationPatient", "Rows and Columns", "PixelSpacing")  # the plainest thing to say
    groups = []
    for key, members in by_size:
        differing = [name for name, a, b in zip(names, key, largest, strict=False) if a != b]
        groups.append((members, next((name for name in first if name in differing), (differing or [""])[0])))
    return groups


def is_misfit(members: Sequence[Frame], attribute: str, largest: Sequence[Frame]) -> bool:
    """Whether frames that differ from the largest volume of their series in this attribute are no volume
    themselves: too few, and not of another patient, or captured from a screen."""
    captured = [str(frames[0].kinds["SOPClassUID"]).startswith(SECONDARY) for frames in (members, largest)]
    return captured == [True, False] or (len(members) < MINIMUM_SLICES and attribute not in PERSON)


def misfit_of(attribute: str, members: Sequence[Frame]) -> UnusableScan:
    """Why a few frames that differ from a volume in this attribute are no part of it."""
    detail = f"{len(members)} frames differ in {attribute}"
    if str(members[0].kinds["SOPClassUID"]).startswith(SECONDARY):
        return UnusableScan(Reason.SECONDARY_CAPTURE, detail)
    reasons = {
        "ImageOrientationPatient": Reason.MIXED_ORIENTATION,
        "Rows and Columns": Reason.MIXED_SIZES,
        "PixelSpacing": Reason.MIXED_SIZES,
    }
    return UnusableScan(reasons.get(attribute, Reason.AMBIGUOUS_FRAMES), detail)


def _key(frames: Sequence[Frame], tag: str) -> list[Hashable]:
    values: list[Hashable] = [frame.kinds[tag] for frame in frames]
    if tag not in SETTINGS:
        return values
    numbers = sorted({value for value in values if isinstance(value, float)})
    place: dict[Hashable, Hashable] = {}
    group = -1
    for index, value in enumerate(numbers):
        if not index or value - numbers[index - 1] > SAME_VALUE * abs(value):
            group += 1
        place[value] = group
    return [place.get(value, value) for value in values]


def _clusters(values: Sequence[np.ndarray], absolute: float, relative: float) -> list[Hashable]:
    seen: list[np.ndarray] = []
    places: list[Hashable] = []
    for value in values:
        same = [i for i, one in enumerate(seen) if np.allclose(value, one, rtol=relative, atol=absolute)]
        if not same:
            seen.append(value)
        places.append(same[0] if same else len(seen) - 1)
    return places


def arrange(frames: Sequence[Frame]) -> Arranged:
    """The frames of one group by position, then by time. Raises `UnusableScan` where that is ambiguous, or
    what their values mean."""
    if len({frame.rescaled for frame in frames}) > 1:
        raise UnusableScan(Reason.AMBIGUOUS_FRAMES, "RescaleIntercept")
    if len({frame.inverted for frame in frames}) > 1:
        raise UnusableScan(Reason.AMBIGUOUS_FRAMES, "PhotometricInterpretation")
    positions = _positions(frames)
    if all(len(position) == 1 for position in positions):
        _check_one_volume([position[0] for position in positions])
        return Arranged(positions)
    if (found := _by_time(positions, _strong(frames))) is not None:
        return Arranged(found)
    positions, duplicates = _without_duplicates(positions)
    if all(len(position) == 1 for position in positions):
        _check_one_volume([position[0] for position in positions])
        return Arranged(positions, duplicates)
    left = [frame for position in positions for frame in position]
    for names in (_strong(left), CLOCKS):
        if (found := _by_time(positions, names)) is not None:
            return Arranged(found, duplicates)
    if (found := _by_number(positions)) is not None:
        return Arranged(found, duplicates, (Note.ORDER_BY_NUMBER,))
    raise _ambiguous(positions, left)


def _strong(frames: Sequence[Frame]) -> tuple[str, ...]:
    dimensions = {name for frame in frames for name in frame.times if name.startswith("dimension ")}
    return (*TIMES, *sorted(dimensions))


def _positions(frames: Sequence[Frame]) -> list[list[Frame]]:
    normal = np.cross(*frames[0].directions)
    if not 0.99 < np.linalg.norm(normal) < 1.01:
        raise UnusableScan(Reason.SINGULAR_AFFINE, "rows and columns are not perpendicular")
    along = {id(frame): float(normal @ frame.position) for frame in frames}
    found: list[list[Frame]] = []
    for frame in sorted(frames, key=lambda one: along[id(one)]):
        for position in reversed(found):
            if along[id(frame)] - along[id(position[0])] > SAME_PLACE_MM:
                found.append([frame])
                break
            if np.linalg.norm(frame.position - position[0].position) <= SAME_PLACE_MM:
                position.append(frame)
                break
        else:
            found.append([frame])
    levels = [along[id(position[0])] for position in found]
    if len(levels) > 1 and min(np.diff(levels)) <= SAME_PLACE_MM:
        raise UnusableScan(Reason.AMBIGUOUS_FRAMES, "ImagePositionPatient: frames side by side in one plane")
    return found


def _check_one_volume(frames: Sequence[Frame]) -> None:
    """Refuse slices of several volumes that lie between each other."""
    for name in (*TIMES[:2], "AcquisitionNumber"):
        values = [frame.times[name] for frame in frames]
        runs = 1 + sum(a != b for a, b in pairwise(values))
        if runs > len(set(values)) or (name in TIMES[:2] and 1 < len(set(values)) < len(values)):
            raise UnusableScan(
                Reason.AMBIGUOUS_FRAMES, f"{name} has {len(set(values))} values in {len(values)} slices"
            )


def _by_time(positions: Sequence[list[Frame]], names: Sequence[str]) -> list[list[Frame]] | None:
    """The frames of every position in the order of the attributes that tell them apart: of one, of which all
    that do so must agree, else of all together; None where they do not."""
    frames = [frame for position in positions for frame in position]
    varying = [name for name in names if len({frame.times.get(name) for frame in frames}) > 1]
    whole = [(name, found) for name in varying if (found := _sorted_by(positions, [name])) is not None]
    if not whole:
        return _sorted_by(positions, varying) if len(varying) > 1 else None
    volumes = {frozenset(frozenset(map(id, one)) for one in zip(*found, strict=True)) for _, found in whole}
    if len(volumes) > 1:
        raise UnusableScan(Reason.AMBIGUOUS_FRAMES, f"{' and '.join(n for n, _ in whole)} disagree")
    return whole[0][1]


def _sorted_by(positions: Sequence[list[Frame]], names: Sequence[str]) -> list[list[Frame]] | None:
    keyed = [{_order(frame, names): frame for frame in position} for position in positions]
    same = all(len(one) == len(position) for one, position in zip(keyed, positions, strict=True))
    if not same or any(one.keys() != keyed[0].keys() for one in keyed):
        return None
    return [[one[key] for key in sorted(one)] for one in keyed]


def _order(frame: Frame, names: Sequence[str]) -> tuple[str | float, ...]:
    """Values that sort, whatever they are: numbers as numbers, before words; what is not said, first."""
    flat: list[str | float] = []

    def add(value: Hashable) -> None:
        if isinstance(value, tuple):
            for one in value:
                add(one)
        else:
            number = isinstance(value, (int, float))
            flat.extend((0.0 if value is None else 1.0 if number else 2.0, value if number else 0.0))  # type: ignore[arg-type]
            flat.append("" if number or value is None else str(value))

    for name in names:
        add(frame.times.get(name))
    return tuple(flat)


def _without_duplicates(positions: Sequence[list[Frame]]) -> tuple[list[list[Frame]], tuple[Frame, ...]]:
    """Each position without the frames whose pixels another there has; the first of the files stays."""
    kept: list[list[Frame]] = []
    dropped: list[Frame] = []
    for position in positions:
        seen: set[tuple[object, ...]] = set()
        kept.append([])
        for frame in position:
            key = (_pixels_hash(frame), frame.slope, frame.intercept) if len(position) > 1 else ()
            (dropped if key in seen else kept[-1]).append(frame)
            seen.add(key)
    return kept, tuple(dropped)


def _pixels_hash(frame: Frame) -> str:
    try:
        stored = pydicom.dcmread(frame.path, force=True, specific_tags=["PixelData"]).get("PixelData") or b""
    except (OSError, ValueError, EOFError, NotImplementedError) as error:
        raise UnusableScan(Reason.CORRUPT, "its pixels cannot be read") from error
    return f"{hashlib.sha256(stored).hexdigest()}/{frame.index}"


def _by_number(positions: Sequence[list[Frame]]) -> list[list[Frame]] | None:
    """By InstanceNumber, where it runs in even blocks: position after position within each volume, or volume
    after volume within each position."""
    if len({len(position) for position in positions}) > 1 or len(positions) < 2:
        return None
    if any(frame.number is None for position in positions for frame in position):
        return None
    found = [sorted(position, key=lambda frame: frame.number or 0) for position in positions]
    numbers = np.array([[frame.number for frame in position] for position in found])  # position time
    steps, turns = np.diff(numbers, axis=0), np.diff(numbers, axis=1)
    if (turns <= 0).any() or len(np.unique(steps)) > 1 or len(np.unique(turns)) > 1:
        return None
    step, turn = abs(int(steps.flat[0])), int(turns.flat[0])
    blocks = turn >= len(positions) * step > 0 or step >= numbers.shape[1] * turn
    return found if blocks else None


def _ambiguous(positions: Sequence[list[Frame]], frames: Sequence[Frame]) -> UnusableScan:
    counted = f"{len(frames)} frames at {len(positions)} positions"
    varying = [n for n in (*_strong(frames), *CLOCKS) if len({f.times.get(n) for f in frames}) > 1]
    for name in varying:
        each = Counter((frame.times.get(name), index) for index, p in enumerate(positions) for frame in p)
        values = len({frame.times.get(name) for frame in frames})
        if max(each.values()) == 1 and values * len(positions) < 2 * len(frames):
            return UnusableScan(Reason.UNEVEN_SLICES, f"{counted}, {values} values of {name}")
    if varying:
        why = f"{' and '.join(varying)} do not tell them apart"
        return UnusableScan(Reason.AMBIGUOUS_FRAMES, f"{counted}; {why}")
    uneven = len({len(position) for position in positions}) > 1
    reason = Reason.UNEVEN_SLICES if uneven else Reason.AMBIGUOUS_FRAMES
    return UnusableScan(reason, f"{counted}; only InstanceNumber differs")
