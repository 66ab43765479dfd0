"""A manifest: a CSV with a row per scan, in which the site says everything itself.

Columns `path` and `patient` (or a `patient_pattern` in site.yaml); also read: `modality`, `label`, `visit`;
all others are covariates. Paths start at the manifest's folder; backslashes and `..` are read. A file has one
place: named twice with one patient it counts once, with two it has none.
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePath

from client.scans.files import Files
from client.scans.layouts import Candidate, Found, LayoutRules, map_of, not_nifti
from client.scans.patients import Reading, Whose, patients_by_pattern
from client.scans.tables import PATIENT_COLUMNS, Covariates, Join, Table, covariates_of, read_table
from scans.nifti import is_nifti_name
from scans.scans import Exclusion, FileKind, Reason, UnusableScan, file_kind

BY_MANIFEST = "a patient is what the manifest's column {} says"
_VISIT_COLUMNS = ("visit", "session", "session_id", "timepoint", "studydate")


@dataclass
class _Row:
    """What a row of the manifest says."""

    number: int
    named: Path
    patient: str
    modality: str
    label: Path | None
    covariates: Covariates
    visit: str


class _Folder:
    """Files as the manifest may name them: walked ones under their own path, whatever way leads there."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.excluded = {exclusion.path: exclusion for exclusion in files.exclusions}
        self.by_folder: dict[Path, list[Path]] = defaultdict(list)
        for path in files.kinds:
            self.by_folder[path.parent].append(path)
        known = (*files.kinds, *self.by_folder, *self.excluded)
        self._known = {os.path.normpath(path): path for path in known}
        self._real = Path(os.path.realpath(files.root))

    def place(self, cell: str) -> Path:
        """The path that a cell names: as walked where it leads below the root, else as written."""
        for written in dict.fromkeys((cell, cell.replace("\\", "/"))):
            there = written if written.startswith("/") else f"{self.files.root}/{written}"
            if (known := self._known.get(os.path.normpath(there))) is not None:
                return known
            if (path := Path(there)).exists():  # by another way, or outside
                real = Path(os.path.realpath(path))
                inside = real.is_relative_to(self._real)
                return (
                    self.files.root / real.relative_to(self._real) if inside else Path(os.path.normpath(path))
                )
        return Path(os.path.normpath(there))

    def members(self, named: Path) -> tuple[Path, ...]:
        """The file, or all files right in the folder, that a row names; none where there is nothing."""
        if named in self.files.kinds:
            return (named,)
        if named in self.by_folder:
            return tuple(self.by_folder[named])
        try:
            return (
                tuple(sorted(p for p in named.iterdir() if p.is_file()))
                if named.is_dir()
                else (named,) * named.exists()
            )
        except OSError:
            return ()

    def kind(self, path: Path) -> FileKind | None:
        """What a file's first bytes say, walked or not; None when it cannot be read."""
        try:
            return self.files.kinds.get(path) or file_kind(path)
        except UnusableScan:
            return None


def survey_manifest(manifest: Path, files: Files, rules: LayoutRules) -> Found:
    """Candidates that the manifest names; every other file of its folder is an exclusion.

    Raises `ValueError` with file, row and cure when the manifest cannot be understood.
    """
    if not manifest.is_file():
        raise ValueError(f"Expected a manifest at {manifest}; nothing is there.")
    table = read_table(manifest)
    folder = _Folder(files)
    rows, column, cells = _rows(table, folder, rules)
    reading = _reading(rows, cells, column, rules)
    for row, whose in zip(rows, reading.whose, strict=True):
        row.patient, row.visit = whose.patient, row.visit or whose.visit
    found = Found("manifest", [], files.exclusions)
    rows = _one_place(rows, found.notes)
    used = {manifest}
    scans = {row.named for row in rows}
    for row in rows:
        _place(row, scans, folder, rules.names.of(row.modality), found, used)
    for path, kind in files.kinds.items():
        if path not in used:
            scan = is_nifti_name(path) or kind == "dicom"
            found.exclusions.append(
                Exclusion(path, Reason.NOT_IN_MANIFEST) if scan else not_nifti(path, kind)
            )
    missing = len(rows) - len(found.candidates)
    join = Join(
        manifest, column or table.column("path"), len(rows), missing, len(found.candidates), 0, table.note
    )
    found.exclusions = [one for one in found.exclusions if one.path != manifest]
    found.exclusions.append(Exclusion(manifest, Reason.TABLE, join.summary))
    found.joins.append(join)
    paths = [_below(candidate.path, files.root) for candidate in found.candidates]
    named = [Whose(candidate.patient, candidate.visit) for candidate in found.candidates]
    found.patients = map_of(paths, Reading(reading.rule, named, reading.doubts))
    return found


def _below(path: Path, root: Path) -> PurePath:
    text, start = str(path), f"{root}/"
    return (
        PurePath(text[len(start) :]) if text.startswith(start) else path
    )  # relative_to takes ten times that


def _rows(table: Table, folder: _Folder, rules: LayoutRules) -> tuple[list[_Row], str, list[str]]:
    """The rows, the column that names patients ("" when a pattern does), and the paths as written."""
    path, patient = table.column("path", "file", "filename", "image"), table.column(*PATIENT_COLUMNS)
    lacks = ["path"] * (not path) + ["patient"] * (not patient and not rules.patient_pattern)
    if lacks:
        raise ValueError(
            f"Expected {table.path} to have columns path and patient; it lacks {' and '.join(lacks)}. It has "
            f"{', '.join(table.columns)}."
        )
    modality, label = table.column("modality", "contrast"), table.column("label", "mask", "segmentation")
    visit = table.column(*_VISIT_COLUMNS)
    fixed = {path, patient, modality, label, visit} - {""}
    rows, cells = [], []
    for number, row in zip(table.numbers, table.rows, strict=True):
        if not row[path]:
            raise ValueError(f"Expected a path in row {number} of {table.path}; it is empty. Remove the row.")
        cells.append(row[path].replace("\\", "/"))
        rows.append(
            _Row(
                number,
                folder.place(row[path]),
                row[patient] if patient else "",
                row[modality] if modality else "",
                folder.place(row[label]) if label and row[label] else None,
                covariates_of(row, fixed),
                row[visit] if visit else "",
            )
        )
    return rows, patient, cells


def _reading(rows: list[_Row], cells: list[str], column: str, rules: LayoutRules) -> Reading:
    if rules.patient_pattern:
        return patients_by_pattern([PurePath(cell) for cell in cells], rules.patient_pattern)
    return Reading(BY_MANIFEST.format(column), [Whose(row.patient) for row in rows])


def _one_place(rows: list[_Row], notes: list[str]) -> list[_Row]:
    """One row per file: rows that repeat one are dropped, those that contradict one lose their patient."""
    first: dict[Path, _Row] = {}
    for row in rows:
        before = first.setdefault(row.named, row)
        if before is not row:
            same = (before.patient, before.modality, before.label) == (row.patient, row.modality, row.label)
            notes.append(
                f"Rows {before.number} and {row.number} of the manifest name one file"
                + ("; it counts once." if same else " and contradict each other; it is left out.")
            )
            if not same:
                before.patient = ""
    return list(first.values())


def _place(
    row: _Row, scans: set[Path], folder: _Folder, modality: str, found: Found, used: set[Path]
) -> None:
    """Make the row's scan a candidate or an exclusion, and its label the candidate's; note what is `used`."""
    files = folder.files
    excluded = folder.excluded.get(row.named)
    if excluded is not None and excluded.reason is Reason.LINKED_FILE:  # named here: that is being told to
        found.exclusions.remove(excluded)
        excluded = None
    members = folder.members(row.named)
    series = (
        tuple(path for path in members if folder.kind(path) == "dicom")
        if row.named not in members
        else members
    )
    fresh = [path for path in members if path not in used]
    used.update(fresh)
    found.exclusions += [
        not_nifti(path, files.kinds[path]) for path in fresh if path not in series and path in files.kinds
    ]
    if excluded is not None:
        found.notes.append(f"Row {row.number} names a file that is left out: {excluded.reason.value}.")
    elif not series:
        found.exclusions.append(Exclusion(row.named, Reason.MISSING_FILE))
    elif not set(series) <= set(fresh):
        found.notes.append(f"Row {row.number} names files that another row names, and is left out.")
        found.exclusions += [
            Exclusion(path, Reason.DUPLICATE, "named twice") for path in series if path in fresh
        ]
    else:
        if row.named not in members:
            series = _one_series(row.named, series, found.exclusions)
        label = _label(row, scans, folder, found, used)
        if series:
            found.candidates.append(
                Candidate(row.named, series, row.patient, modality, label, row.covariates, row.visit)
            )


def _one_series(named: Path, files: tuple[Path, ...], exclusions: list[Exclusion]) -> tuple[Path, ...]:
    """The files of the one DICOM series in a folder that a row names; none, with the reason, when it holds
    several. What leaves a series elsewhere (a localizer, a slice that was sent again) leaves it here, too."""
    from scans.dicom import find_series  # pydicom takes a fifth of a second to import

    found, left_over = find_series(files)
    exclusions += left_over
    if len(found) == 1:
        return found[0].files
    if found:
        detail = f"{len(found)} series in one folder: name a folder for each"
        inside = tuple(path for series in found for path in series.files)
        exclusions.append(Exclusion(named, Reason.SEVERAL_SERIES, detail, inside))
    return ()


def _label(row: _Row, scans: set[Path], folder: _Folder, found: Found, used: set[Path]) -> Path | None:
    label = row.label
    if label is None or label in folder.excluded:
        return None
    if label in scans:
        found.notes.append(f"Row {row.number} names as its label a file that is a scan; it has no label.")
        return None
    there = bool(folder.members(label))
    if not there and label not in used:
        found.exclusions.append(Exclusion(label, Reason.MISSING_FILE, "a label"))
    used.add(label)
    return label if there else None
