"""The cohort: which scans take part, which do not, and why; and who is held out.

Opening a cohort has every scan read once (by whom and in which order is no matter, `judges`) and leaves every
file below the data root in exactly one place: a scan's entry (as image or label) or the exclusion table, with
a reason. Both tables are patient data and stay at the site; `Cohort.summary` is counts. Where files come from
is `client/scans/layouts.py`; what a scan must be is `scans/scans.py`.

Splits are by patient, from a salted hash of the patient's name alone: not from the order of files, not from
who else is there. A patient who arrives later moves nobody, and no patient is in two splits.
"""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from client.books.forgotten import Forgotten
from client.scans.contrasts import ModalityNames
from client.scans.judgement import Judges, Source, Verdict, one_by_one
from client.scans.layouts import Candidate, Found, Layout, LayoutRules, survey
from client.scans.names import readable
from client.scans.patients import PatientMap
from client.scans.tables import Covariates, Join
from meduet_models.seeds import digest_of
from scans.scans import Exclusion, Note, Reason, Scan, UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import read_files, read_label
from storage.files import write_whole

__all__ = ["Cohort", "Exclusion", "ScanEntry", "Split", "open_cohort", "read_entry", "split_of"]

Split = Literal["train", "validation", "test"]
COPY = "the same voxels as an earlier scan"
"""Detail of the exclusion of a copy of a scan; slices that were sent again are duplicates, too."""
SPLITS: tuple[Split, Split, Split] = ("train", "validation", "test")


@dataclass(frozen=True)
class ScanEntry:
    """One usable scan."""

    scan_id: str
    """Hash of voxels and geometry, 64 hex digits."""
    patient: str
    path: Path
    """The file, or the folder of a DICOM series."""
    files: tuple[Path, ...]
    """The file, or all files of the series."""
    modality: str
    """Shared name."""
    split: Split
    label_path: Path | None = None
    covariates: Covariates = field(default_factory=dict)
    num_volumes: int = 1
    """Volumes in the file (4-D); the plan says which becomes the scan."""
    num_repaired: int = 0
    """NaN or infinite voxels that became the lowest finite value."""
    visit: str = ""
    """What tells this study of the patient from others; empty where nothing does."""
    kept: float = 1.0
    """Share of what is brighter than the scan's mean that lies within the plan's crop."""
    placed_label: bool = False
    """Whether the label says nothing of where it lies, and was given the place of its image."""
    notes: tuple[Note, ...] = ()
    """What a person should look at."""


@dataclass(frozen=True)
class Cohort:
    """The scans that take part, and all other files with their reasons."""

    root: Path
    scans: tuple[ScanEntry, ...]
    exclusions: tuple[Exclusion, ...]
    patient_map: PatientMap = field(default_factory=PatientMap)
    """Whose every candidate is, those that take no part included, by which rule, and what is doubtful."""
    joins: tuple[Join, ...] = ()
    """Tables that were read, and what came of them."""
    notes: tuple[str, ...] = ()
    """What else a person should look at; may name files."""

    def patients(self, split: Split | None = None) -> list[str]:
        """The patients, of one split or of all, in alphabetical order."""
        return sorted({scan.patient for scan in self.scans if split in (None, scan.split)})

    def studies(self) -> dict[tuple[str, str], list[ScanEntry]]:
        """The volumes of each patient at each visit, in order: several contrasts of one study."""
        found: dict[tuple[str, str], list[ScanEntry]] = {}
        for scan in self.scans:
            found.setdefault((scan.patient, scan.visit), []).append(scan)
        return found

    def without(self, found: Mapping[str, UnusableScan]) -> "Cohort":
        """The cohort less the scans (by id) that later proved unusable; each moves to the exclusion table."""
        moved: list[Exclusion] = []
        for scan in self.scans:
            if scan.scan_id in found:
                error = found[scan.scan_id]
                moved.append(Exclusion(scan.path, error.reason, error.detail, scan.files))
        kept = tuple(scan for scan in self.scans if scan.scan_id not in found)
        moved += _lost(
            {scan.label_path for scan in self.scans if scan.scan_id in found},
            {scan.label_path for scan in kept} | {exclusion.path for exclusion in self.exclusions},
        )
        return dataclasses.replace(self, scans=kept, exclusions=(*self.exclusions, *moved))

    def summary(self) -> dict[str, Any]:
        """Counts only: scans, patients, labels, splits, exclusions by reason. Names nobody and no file."""
        return {
            "scans": len(self.scans),
            "patients": len(self.patients()),
            "labelled": sum(scan.label_path is not None for scan in self.scans),
            "repaired": sum(scan.num_repaired > 0 for scan in self.scans),
            "splits": {split: len(self.patients(split)) for split in SPLITS},
            "exclusions": dict(sorted(Counter(e.reason.value for e in self.exclusions).items())),
        }

    def write_csv(self, folder: Path) -> None:
        """Write cohort.csv and exclusions.csv, for the site's own eyes; paths are relative to the data
        root."""
        names = sorted({name for scan in self.scans for name in scan.covariates})
        rows: list[list[object]] = [
            ["scan_id", "patient", "visit", "split", "modality", "path", "label",
             "num_files", "num_volumes", "num_repaired", "kept", "notes", *names]
        ]  # fmt: skip
        for scan in self.scans:
            label = self._below(scan.label_path) if scan.label_path else ""
            rows.append(
                [scan.scan_id, scan.patient, scan.visit, scan.split, scan.modality, self._below(scan.path),
                 label, len(scan.files), scan.num_volumes, scan.num_repaired, f"{scan.kept:.3f}",
                 " ".join(scan.notes), *(scan.covariates.get(name, "") for name in names)]
            )  # fmt: skip
        write_whole(folder / "cohort.csv", _table(rows))
        rows = [["path", "reason", "detail", "num_files"]]
        rows += [[self._below(e.path), e.reason.value, e.detail, len(e.all_files)] for e in self.exclusions]
        write_whole(folder / "exclusions.csv", _table(rows))

    def _below(self, path: Path) -> str:
        below = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
        return readable(below)


def _table(rows: list[list[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def split_of(patient: str, fractions: tuple[float, float, float], salt: str) -> Split:
    """The split of a patient: from a salted hash of the name, so that it depends on nobody else."""
    digest = digest_of(salt, patient, separator="\0")
    place = int.from_bytes(digest[:8], "big") / 2**64
    return (
        "train" if place < fractions[0] else "validation" if place < fractions[0] + fractions[1] else "test"
    )


def read_entry(entry: ScanEntry, plan: VolumePlan) -> tuple[Scan, Scan | None]:
    """The scan of an entry and its label, read again. Raises `UnusableScan` when a file changed since."""
    scan = read_files(entry.files, plan.four_d)
    if scan.scan_id != entry.scan_id:
        raise UnusableScan(Reason.CORRUPT, "the file changed since the cohort was opened")
    return scan, read_label(entry.label_path, scan) if entry.label_path is not None else None


class NoScans(ValueError):
    """There is nothing to train on: the folder is not mounted, or holds no usable scan."""


def open_cohort(
    root: Path,
    *,
    plan: VolumePlan,
    split_salt: str,
    layout: Layout = "auto",
    modality_names: Mapping[str, str] | None = None,
    patient_pattern: str = "",
    label_pattern: str = LayoutRules.label_pattern,
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    follow_links: bool = False,
    found: Found | None = None,
    judges: Judges | None = None,
    progress: Callable[[int, int], None] | None = None,
    forgotten: Forgotten | None = None,
) -> Cohort:
    """Have every scan below `root` read once and decide about it.

    `found`: what a survey by these very settings found there; None looks now. `judges` read and judge scans,
    in whatever order; None: here, one by one. `progress(done, total)` is called after each scan. `forgotten`:
    patients who withdrew; their scans are not read, nor admitted under another name. Raises
    `ValueError` when the site's own settings or tables make no sense, and what `judges` raise; scans never
    raise.
    """
    if min(split_fractions) < 0 or abs(sum(split_fractions) - 1.0) > 1e-9:
        raise ValueError(f"Expected split fractions >= 0 that sum to 1; got {split_fractions}.")
    rules = LayoutRules(
        modality_names=modality_names or {},
        patient_pattern=patient_pattern,
        label_pattern=label_pattern,
        wanted=plan.modalities or (plan.modality,),
        follow_links=follow_links,
    )
    found = found or survey(root, layout, rules)
    withdrew = forgotten.patient if forgotten is not None else _nobody
    verdicts = _verdicts(found, rules.names, withdrew, judges or one_by_one(plan), progress)
    scans: list[ScanEntry] = []
    exclusions = list(found.exclusions)
    seen: set[str] = set()
    for candidate, verdict in zip(found.candidates, verdicts, strict=True):
        try:
            _refuse_forgotten(verdict, forgotten)
            entry, label_exclusion = _admit(candidate, verdict, seen, split_fractions, split_salt)
            scans.append(entry)
            exclusions += label_exclusion
        except UnusableScan as error:
            exclusions.append(Exclusion(candidate.path, error.reason, error.detail, candidate.files))
    exclusions = _once(exclusions, {scan.label_path for scan in scans})
    placed = {scan.label_path for scan in scans} | {exclusion.path for exclusion in exclusions}
    exclusions += _lost((candidate.label for candidate in found.candidates), placed)
    return Cohort(
        root if root.is_dir() else root.parent,
        tuple(scans),
        tuple(exclusions),
        found.patients,
        tuple(found.joins),
        tuple(found.notes),
    )


def _refuse_forgotten(verdict: Verdict, forgotten: Forgotten | None) -> None:
    """Raise `UnusableScan` for a scan of somebody who withdrew, whatever it is called now."""
    if forgotten is not None and not isinstance(verdict, UnusableScan) and forgotten.scan(verdict.scan_id):
        raise UnusableScan(Reason.WITHDREW)


def _nobody(name: str) -> bool:
    return False


def _once(exclusions: Iterable[Exclusion], labels: Container[Path | None]) -> list[Exclusion]:
    """Each label that fits one image and not another of its study, once: with the one that it fits."""
    kept: dict[tuple[Path, tuple[Path, ...]], Exclusion] = {}
    for exclusion in exclusions:
        if exclusion.path not in labels:
            kept.setdefault((exclusion.path, exclusion.files), exclusion)
    return list(kept.values())


def _lost(labels: Iterable[Path | None], placed: Container[Path | None]) -> list[Exclusion]:
    """The exclusions of labels whose images are excluded, but for those that have a place already."""
    lost = sorted({label for label in labels if label is not None and label not in placed})
    return [Exclusion(label, Reason.LABEL_WITHOUT_IMAGE, "its image is excluded") for label in lost]


def _verdicts(
    found: Found,
    names: ModalityNames,
    withdrew: Callable[[str], bool],
    judges: Judges,
    progress: Callable[[int, int], None] | None,
) -> list[Verdict]:
    """What comes of each candidate, by itself; only those of the plan's modality with a patient are read."""
    verdicts: dict[int, Verdict] = {}
    asked: list[int] = []
    total = len(found.candidates)
    for number, candidate in enumerate(found.candidates):
        if not names.takes(candidate.modality):
            verdicts[number] = UnusableScan(Reason.NO_SUCH_MODALITY, readable(candidate.modality))
        elif not candidate.patient:
            verdicts[number] = UnusableScan(Reason.NO_PATIENT)
        elif withdrew(candidate.patient):
            verdicts[number] = UnusableScan(Reason.WITHDREW)
        else:
            asked.append(number)
    report = progress or (lambda done, total: None)
    for done in range(1, len(verdicts) + 1):
        report(done, total)
    sources = [Source(found.candidates[number].files, found.candidates[number].label) for number in asked]
    for place, verdict in judges(sources):
        verdicts[asked[place]] = verdict
        report(len(verdicts), total)
    return [verdicts[number] for number in range(total)]


def _admit(
    candidate: Candidate,
    verdict: Verdict,
    seen: set[str],
    fractions: tuple[float, float, float],
    salt: str,
) -> tuple[ScanEntry, list[Exclusion]]:
    """The entry of a candidate, and its label's exclusion if the label is unusable; raises `UnusableScan`."""
    if isinstance(verdict, UnusableScan):
        raise verdict
    if verdict.voxels_sha256 in seen:
        raise UnusableScan(Reason.DUPLICATE, COPY)
    seen.add(verdict.voxels_sha256)
    if verdict.is_label_map:
        raise UnusableScan(Reason.LABEL_MAP)
    label, exclusions = candidate.label, []
    if label is not None and verdict.label_reason is not None:
        exclusions.append(Exclusion(label, verdict.label_reason, verdict.label_detail))
        label = None
    entry = ScanEntry(
        scan_id=verdict.scan_id,
        patient=candidate.patient,
        path=candidate.path,
        files=candidate.files,
        modality=candidate.modality,
        split=split_of(candidate.patient, fractions, salt),
        label_path=label,
        covariates=candidate.covariates,
        num_volumes=verdict.num_volumes,
        visit=candidate.visit,
        kept=verdict.kept,
        placed_label=verdict.placed_label,
        notes=verdict.notes,
        num_repaired=verdict.num_repaired,
    )
    return entry, exclusions
