"""What one reading of a scan says of it, by itself: is it usable, which scan is it, does its label fit.

A judgement is small and plain: it crosses to another process as JSON, and is remembered for as long as the
scan's files are as they were. Whatever depends on other scans (duplicates, patients, splits) is the cohort's
(`client/scans/cohort.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scans.scans import Note, Reason, Scan, UnusableScan, is_hounsfield, is_label_map
from scans.volume_plan import VolumePlan
from scans.volumes import kept_share, read_files, read_label, same_grid


@dataclass(frozen=True)
class Source:
    """What is read for one scan."""

    files: tuple[Path, ...]
    """The file, or all files of a DICOM series."""
    label: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; names in any encoding survive."""
        return {"files": list(map(str, self.files)), "label": None if self.label is None else str(self.label)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Source":
        """The inverse of `to_json`."""
        label = values["label"]
        return Source(tuple(map(Path, values["files"])), None if label is None else Path(label))


@dataclass(frozen=True)
class Judgement:
    """Of a scan that can be read."""

    scan_id: str
    """Hash of voxels and geometry, 64 hex digits."""
    voxels_sha256: str
    """Hash of the voxels alone."""
    is_label_map: bool = False
    """Whether its values are a segmentation's; then nothing below was looked at."""
    num_volumes: int = 1
    num_repaired: int = 0
    kept: float = 1.0
    """Share of what is brighter than the scan's mean that lies within the plan's crop."""
    notes: tuple[Note, ...] = ()
    placed_label: bool = False
    """Whether its label says nothing of where it lies, and was given the place of the scan."""
    label_reason: Reason | None = None
    """Why its label is not used."""
    label_detail: str = ""


Verdict = Judgement | UnusableScan
"""What comes of a reading."""
Judges = Callable[[Sequence[Source]], Iterator[tuple[int, Verdict]]]
"""Reads scans, each once, and says what came of each, by its number; in any order."""


@dataclass(frozen=True, eq=False)
class Read:
    """A scan in memory, with its judgement and its label, when that fits."""

    judgement: Judgement
    scan: Scan
    label: Scan | None


def read(source: Source, plan: VolumePlan) -> Read:
    """Read a scan and its label, each once, and judge them. Raises `UnusableScan` for the scan's sake."""
    scan = read_files(source.files, plan.four_d)
    if is_label_map(scan.array):
        return Read(Judgement(scan.scan_id, scan.voxels_sha256, is_label_map=True), scan, None)
    label, problem = None, None
    if source.label is not None:
        try:
            label = read_label(source.label, scan)
            if not same_grid(scan, label):
                raise UnusableScan(Reason.LABEL_MISMATCH, "not on the grid of its image")
        except UnusableScan as error:
            label, problem = None, error
    odd = plan.window == "ct_hu" and not is_hounsfield(scan.array)
    judgement = Judgement(
        scan_id=scan.scan_id,
        voxels_sha256=scan.voxels_sha256,
        num_volumes=scan.num_volumes,
        num_repaired=scan.num_repaired,
        kept=kept_share(scan, plan),
        notes=scan.notes + (Note.NOT_HOUNSFIELD,) * odd,
        placed_label=label is not None and label.placed,
        label_reason=problem.reason if problem else None,
        label_detail=problem.detail if problem else "",
    )
    return Read(judgement, scan, label)


def judge(source: Source, plan: VolumePlan) -> Verdict:
    """What one reading says of a scan."""
    try:
        return read(source, plan).judgement
    except UnusableScan as error:
        return error


def one_by_one(plan: VolumePlan) -> Judges:
    """Judges that read the scans in order, in this process, and keep nothing of them."""

    def judges(sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
        for number, source in enumerate(sources):
            yield number, judge(source, plan)

    return judges


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """Plain values; exact."""
    if isinstance(verdict, UnusableScan):
        return {"reason": verdict.reason.value, "detail": verdict.detail}
    return {**vars(verdict), "notes": list(verdict.notes)}


def verdict_from_json(values: Mapping[str, Any]) -> Verdict:
    """The inverse of `verdict_to_json`. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
    if "reason" in values:
        return UnusableScan(Reason(values["reason"]), str(values["detail"]))
    reason = values["label_reason"]
    given = {
        "notes": tuple(map(Note, values["notes"])),
        "label_reason": None if reason is None else Reason(reason),
    }
    return Judgement(**{**values, **given})
