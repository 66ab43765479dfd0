"""Four ways a hospital lays out its scans, turned into one list of candidates.

`bids`: sub-*/…, labels under derivatives/labels, participants.tsv. `plain`: NIfTI files in any folders,
labels beside the images or in a folder of their own, covariates.csv. `manifest`: a CSV with a row per scan.
`dicom`: series, found by what their headers say. Only names, tables and DICOM headers are read here; voxels
are `client/scans/cohort.py`'s.

The law: every file below the root is in exactly one candidate (as image or label) or one exclusion.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.scans.labels import IMAGE_FOLDERS, Offers, choose_labels, find_images, is_label_name, label_folder
from client.scans.nifti import is_nifti_name, nifti_stem
from client.scans.scans import Exclusion, FileKind, Reason, UnusableScan, file_kind
from client.scans.tables import Covariates, covariates_of, read_covariates, read_table

Layout = Literal["auto", "bids", "plain", "manifest", "dicom"]

SIDECAR_SUFFIXES = frozenset(
    (
        ".json .tsv .csv .txt .md .rst .bval .bvec .pdf .html .yaml .yml .xml .log .cff .bib .py .sh .ipynb"
    ).split()
)
SIDECAR_NAMES = frozenset("README LICENSE LICENCE CHANGES CHANGELOG AUTHORS NOTICE DICOMDIR".split())
OTHER_IMAGES = frozenset(
    (
        ".img .hdr .mgz .mgh .nrrd .nhdr .mha .mhd .mnc .npy .npz .h5 .hdf5 .par .rec .zip .tar .png .jpg"
        " .jpeg .tif .tiff .bmp"
    ).split()
)
SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+?)(?:[Ss]es[0-9]+)?(?![A-Za-z0-9])")
"""A BIDS subject. `sub-9709Ses2` is the patient sub-9709: two sessions of one person share a split."""
UNKNOWN_MODALITY = "*"
"""The local name, in a site's map, of scans whose modality nothing says."""


@dataclass(frozen=True)
class Candidate:
    """What looks like a scan by its name, place or header; its voxels are unread."""

    path: Path
    files: tuple[Path, ...]
    patient: str
    modality: str
    """Shared name."""
    label: Path | None = None
    covariates: Covariates = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayoutRules:
    """How one site names things. Its own; never leaves."""

    modality_names: Mapping[str, str] = field(default_factory=dict)
    """Local name (BIDS suffix, manifest's modality, DICOM series description, protocol or modality, or `*`
    where nothing says) to shared name. A local name that is not here is taken to be the shared one."""
    patient_pattern: str = ""
    """Regular expression, searched in the path below the root; group 1 is the patient. Empty: the `sub-…` of
    the path; else the folder the scan lies in; else the file's stem."""
    label_pattern: str = r"d?seg(-[A-Za-z0-9]+)?"
    """Regular expression, matched with what a label's name adds to its image's. Of several labels that match,
    the first in alphabetical order; where none matches, none: the others are `label_not_chosen`."""
    default_modality: str = ""
    """Shared name of scans whose modality nothing says, unless the map has `*`."""


Found = tuple[list[Candidate], list[Exclusion]]


def survey(root: Path, layout: Layout, rules: LayoutRules) -> Found:
    """Candidates and exclusions of everything below `root` (a folder, or a manifest).

    Raises `ValueError` when the root is not there, a pattern does not compile, the layout cannot be told, or
    a table cannot be understood.
    """
    if not root.exists():
        raise ValueError(f"Expected a data folder or a manifest at {root}; nothing is there.")
    for name, pattern in (("patient_pattern", rules.patient_pattern), ("label_pattern", rules.label_pattern)):
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"Expected {name} to be a regular expression; {pattern!r}: {error}.") from error
        if name == "patient_pattern" and pattern and not groups:
            raise ValueError(f"Expected {name} to have a group for the patient; got {pattern!r}.")
    if root.is_file():
        if layout not in ("auto", "manifest"):
            raise ValueError(f"Expected a folder for layout {layout!r}; {root} is a file.")
        return _manifest(root, *_walk(root.parent), rules)
    files, exclusions = _walk(root)
    chosen = _guess(root, files) if layout == "auto" else layout
    if chosen == "manifest":
        return _manifest(root / "manifest.csv", files, exclusions, rules)
    if chosen == "dicom":
        return _dicom(files, exclusions, rules)
    return (_bids if chosen == "bids" else _plain)(root, files, exclusions, rules)


def _walk(root: Path) -> tuple[dict[Path, FileKind], list[Exclusion]]:
    """All readable, visible files in alphabetical order with what their first bytes say; the rest as
    exclusions."""
    files: dict[Path, FileKind] = {}
    exclusions: list[Exclusion] = []

    def unreadable(error: OSError) -> None:
        exclusions.append(Exclusion(Path(error.filename), Reason.UNREADABLE, f"errno {error.errno}"))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders.sort()
        links = [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        exclusions += [Exclusion(link, Reason.LINKED_FOLDER) for link in links]
        for path in sorted(Path(folder, name) for name in names):
            if any(part.startswith(".") for part in path.relative_to(root).parts):
                exclusions.append(Exclusion(path, Reason.HIDDEN))
                continue
            try:
                files[path] = file_kind(path)
            except UnusableScan as error:
                exclusions.append(Exclusion(path, error.reason, error.detail))
    return files, exclusions


def _guess(root: Path, files: Mapping[Path, FileKind]) -> Layout:
    if root / "manifest.csv" in files:
        return "manifest"
    nifti, dicom = any(is_nifti_name(path) for path in files), "dicom" in files.values()
    if nifti and dicom:
        raise ValueError(f"Expected one layout; {root} holds both NIfTI and DICOM. Name the layout.")
    if dicom:
        return "dicom"
    subjects = any(
        path.relative_to(root).parts[0].startswith("sub-") for path in files if path.parent != root
    )
    return "bids" if root / "dataset_description.json" in files or subjects else "plain"


def _other(path: Path, kind: FileKind) -> Exclusion:
    """Why a file that does not claim to be NIfTI is no candidate."""
    if kind == "nifti":
        reason = Reason.WRONG_EXTENSION
    elif kind == "dicom":
        reason = Reason.UNSUPPORTED_FORMAT
    elif path.suffix.lower() in SIDECAR_SUFFIXES or path.name in SIDECAR_NAMES:
        reason = Reason.SIDECAR
    elif path.suffix.lower() in OTHER_IMAGES or path.name.lower().endswith((".tar.gz", ".mgh.gz")):
        reason = Reason.UNSUPPORTED_FORMAT
    else:
        reason = Reason.EMPTY if kind == "empty" else Reason.NOT_A_SCAN
    return Exclusion(path, reason)


def _patient(path: Path, root: Path, rules: LayoutRules) -> str:
    """The patient of a NIfTI file, or "" when the site's pattern does not match."""
    below = path.relative_to(root)
    if rules.patient_pattern:
        match = re.search(rules.patient_pattern, below.as_posix())
        return (match.group(1) or "") if match else ""
    for part in (*below.parts[:-1], nifti_stem(path)):
        if match := SUBJECT.match(part):
            return match.group(1)
    folders = [part for part in below.parts[:-1] if part.lower() not in IMAGE_FOLDERS]
    return folders[-1] if folders else nifti_stem(path)


def modality_of(names: Sequence[str], modality_names: Mapping[str, str]) -> str:
    """The shared name of a scan with these local `names`: that of the first the map knows, else the last
    itself."""
    known = [modality_names[name] for name in names if name in modality_names]
    return known[0] if known else (names[-1] if names else "")


def _modality(local: str, rules: LayoutRules) -> str:
    """The shared name of a scan called `local`; what the plan asks for where nothing says and the map has no
    `*`."""
    if local:
        return modality_of([local], rules.modality_names)
    return rules.modality_names.get(UNKNOWN_MODALITY, rules.default_modality)


def _plain(
    root: Path, files: Mapping[Path, FileKind], exclusions: list[Exclusion], rules: LayoutRules
) -> Found:
    scans = []
    for path, kind in files.items():
        if is_nifti_name(path):
            scans.append(path)
        else:
            exclusions.append(_other(path, kind))
    labels = [path for path in scans if label_folder(path, root) is not None or is_label_name(path)]
    images = sorted(set(scans) - set(labels))
    offers = find_images(labels, images, root)
    chosen, more = choose_labels(labels, offers, rules.label_pattern)
    tables = [root / name for name in ("covariates.csv", "participants.tsv") if root / name in files]
    covariates = read_covariates(tables[0]) if tables else {}
    candidates = []
    for path in images:
        patient = _patient(path, root, rules)
        extra = covariates.get(patient) or covariates.get(nifti_stem(path)) or {}
        candidates.append(Candidate(path, (path,), patient, _modality("", rules), chosen.get(path), extra))
    return candidates, exclusions + more


def _bids(
    root: Path, files: Mapping[Path, FileKind], exclusions: list[Exclusion], rules: LayoutRules
) -> Found:
    images: dict[Path, str] = {}
    labels: list[Path] = []
    for path, kind in files.items():
        below = path.relative_to(root)
        if not is_nifti_name(path):
            exclusions.append(_other(path, kind))
        elif below.parts[0] == "derivatives":
            if "labels" in below.parts[1:-1] or is_label_name(path):
                labels.append(path)
            else:
                exclusions.append(Exclusion(path, Reason.DERIVATIVE))
        elif below.parts[0].startswith("sub-") and len(below.parts) > 1:
            images[path] = nifti_stem(path).rpartition("_")[2]
        else:
            exclusions.append(
                Exclusion(path, Reason.DERIVATIVE if len(below.parts) > 1 else Reason.NO_PATIENT)
            )
    by_stem = {nifti_stem(path): path for path in images}
    offers: Offers = defaultdict(list)
    for path in labels:
        stem = nifti_stem(path)
        cuts = [cut for cut in range(len(stem) - 1, 0, -1) if stem[cut] == "_" and stem[:cut] in by_stem]
        if cuts:
            offers[by_stem[stem[: cuts[0]]]].append((stem[cuts[0] + 1 :], path))
        else:  # BIDS derivatives: sub-1_desc-x_dseg labels sub-1_T1w
            entities, _, suffix = re.sub(r"_(space|desc|label|res|den)-[A-Za-z0-9]+", "", stem).rpartition(
                "_"
            )
            matching = [image for image in images if nifti_stem(image).rpartition("_")[0] == entities]
            if len(matching) == 1:
                offers[matching[0]].append((suffix, path))
    chosen, more = choose_labels(labels, offers, rules.label_pattern)
    table = root / "participants.tsv"
    covariates = read_covariates(table) if table in files else {}
    candidates = []
    for path, suffix in images.items():
        subject = path.relative_to(root).parts[0]
        patient = _patient(path, root, rules)
        modality = _modality(suffix, rules)
        candidates.append(
            Candidate(path, (path,), patient, modality, chosen.get(path), covariates.get(subject, {}))
        )
    return candidates, exclusions + more


def _manifest(
    manifest: Path, files: Mapping[Path, FileKind], exclusions: list[Exclusion], rules: LayoutRules
) -> Found:
    if not manifest.is_file():
        raise ValueError(f"Expected a manifest at {manifest}; nothing is there.")
    columns, rows = read_table(manifest)
    if missing := [name for name in ("path", "patient") if name not in columns]:
        raise ValueError(
            f"Expected {manifest} to have columns path and patient; it lacks {', '.join(missing)}."
        )
    candidates: list[Candidate] = []
    used: set[Path] = set()
    for row in rows:
        named = manifest.parent / row["path"]
        label = manifest.parent / row["label"] if row.get("label") else None
        members = tuple(sorted(p for p in named.iterdir() if p.is_file())) if named.is_dir() else (named,)
        if named.is_dir():  # a DICOM series and what lies beside it
            series = tuple(path for path in members if files.get(path) == "dicom")
            exclusions += [_other(p, files[p]) for p in members if p in files and p not in series]
            used |= set(members)
            members = series
        if not members or not members[0].exists():
            exclusions.append(Exclusion(named, Reason.MISSING_FILE))
        elif any(candidate.path == named for candidate in candidates):
            exclusions.append(Exclusion(named, Reason.DUPLICATE, "named twice"))
        else:
            modality = _modality(row.get("modality", ""), rules)
            extra = covariates_of(row, {"path", "patient", "modality", "label"})
            candidates.append(Candidate(named, members, row["patient"], modality, label, extra))
            used.update(members)
            if label is not None:
                used.add(label)
    for path, kind in files.items():
        if path not in used and path != manifest:
            scan = is_nifti_name(path) or kind == "dicom"
            exclusions.append(Exclusion(path, Reason.NOT_IN_MANIFEST) if scan else _other(path, kind))
    return candidates, [*exclusions, Exclusion(manifest, Reason.SIDECAR)]


def _dicom(files: Mapping[Path, FileKind], exclusions: list[Exclusion], rules: LayoutRules) -> Found:
    from client.scans.dicom import find_series  # pydicom takes a fifth of a second to import

    for path, kind in files.items():
        if kind != "dicom":
            wrong = is_nifti_name(path) and kind in ("gzip", "nifti")
            exclusions.append(Exclusion(path, Reason.UNSUPPORTED_FORMAT) if wrong else _other(path, kind))
    series, left_over = find_series([path for path, kind in files.items() if kind == "dicom"])
    exclusions += [Exclusion(path, reason) for path, reason in left_over]
    by_uid = defaultdict(list)
    for one in series:
        by_uid[one.uid].append(one)
    candidates = []
    for one in series:
        folder = one.files[0].parent
        elsewhere = [other for other in by_uid[one.uid] if other is not one]
        if any(not (other.instances & one.instances) for other in elsewhere):
            detail = f"{len(elsewhere) + 1} folders"
            exclusions.append(Exclusion(folder, Reason.SPLIT_SERIES, detail, one.files))
        else:
            modality = modality_of(one.names, rules.modality_names)
            candidates.append(Candidate(folder, one.files, one.patient, modality))
    return candidates, exclusions
