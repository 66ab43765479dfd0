"""Four ways a hospital lays out its scans, turned into one list of candidates.

`bids`: sub-*/…, labels under derivatives/labels, participants.tsv. `plain`: NIfTI files in any folders,
labels beside the images or in a folder of their own, covariates.csv. `manifest`: a CSV with a row per scan
(`client/scans/manifests.py`). `dicom`: series, found by what their headers say
(`client/scans/dicom_series.py`). Only names, tables and DICOM headers are read here; voxels are
`client/scans/cohort.py`'s, who the patient is `client/scans/patients.py`'s.

The law: every file below the root is in exactly one candidate (as image or label) or one exclusion.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from client.scans.contrasts import ModalityNames, contrasts_of_bids, contrasts_of_files
from client.scans.files import Files, walk
from client.scans.labels import (
    Offers,
    choose_labels,
    find_images,
    is_label_name,
    label_folder,
    made_from_others,
)
from client.scans.names import readable, subject_of
from client.scans.patients import PatientMap, Reading, Whose, doubts_of, patients_by_path, patients_by_pattern
from client.scans.tables import TABLE_SUFFIXES, Covariates, Join, join_covariates
from scans.nifti import is_nifti_name, nifti_stem
from scans.scans import Exclusion, FileKind, Reason

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
MADE = frozenset({"derivatives", "code", "sourcedata"})
"""Folders of a BIDS data set that hold no raw scan."""
_BIDS_OF_LABELS = re.compile(r"_(space|desc|label|res|den)-[A-Za-z0-9]+")


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
    visit: str = ""
    """What tells this study of the patient from others; empty where nothing does."""


@dataclass(frozen=True, kw_only=True)
class LayoutRules:
    """How one site names things. Its own; never leaves."""

    modality_names: Mapping[str, str] = field(default_factory=dict)
    """Local name (`client/scans/contrasts.py`) to shared name; `*` is that of scans that nothing names."""
    patient_pattern: str = ""
    """Regular expression, searched in the path below the root, in every layout; group 1 is the patient.
    Empty: told from all paths together (`client/scans/patients.py`), from DICOM headers, or the manifest."""
    label_pattern: str = r"d?seg(-[A-Za-z0-9]+)?"
    """Regular expression, matched with what a label's name adds to its image's. Of several labels that match,
    the first in alphabetical order; where none matches, none: the others are `label_not_chosen`."""
    wanted: tuple[str, ...] = ()
    """Shared names that the plan asks for; the first is that of scans whose modality nothing says."""
    follow_links: bool = False
    """Whether links that lead out of the data root, and to folders, are followed."""

    @property
    def names(self) -> ModalityNames:
        """The site's names of modalities, and the plan's."""
        return ModalityNames(self.modality_names, self.wanted)


@dataclass
class Found:
    """What a survey found."""

    layout: Layout
    candidates: list[Candidate]
    exclusions: list[Exclusion]
    patients: PatientMap = field(default_factory=PatientMap)
    """Whose each candidate is, by which rule."""
    joins: list[Join] = field(default_factory=list)
    """Tables that were read, and what came of them."""
    notes: list[str] = field(default_factory=list)
    """What else a person should look at; may name files."""


def survey(root: Path, layout: Layout, rules: LayoutRules) -> Found:
    """Candidates and exclusions of everything below `root` (a folder, or a manifest).

    Raises `ValueError` when the root is not there, a pattern does not compile or matches nothing, the layout
    cannot be told, or a table cannot be understood.
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
        return _manifest(root, walk(root.parent, rules.follow_links), rules)
    files = walk(root, rules.follow_links)
    match _guess(files) if layout == "auto" else layout:
        case "manifest":
            return _manifest(root / "manifest.csv", files, rules)
        case "dicom":
            return _dicom(files, rules)
        case "bids":
            return _bids(files, rules)
        case _:
            return _plain(files, rules)


def _manifest(manifest: Path, files: Files, rules: LayoutRules) -> Found:
    from client.scans.manifests import survey_manifest

    return survey_manifest(manifest, files, rules)


def _dicom(files: Files, rules: LayoutRules) -> Found:
    from client.scans.dicom_series import survey_dicom  # pydicom takes a fifth of a second to import

    return survey_dicom(files, rules)


def _guess(files: Files) -> Layout:
    if files.root / "manifest.csv" in files.kinds:
        return "manifest"
    nifti, dicom = any(is_nifti_name(path) for path in files.kinds), "dicom" in files.kinds.values()
    if nifti and dicom:
        raise ValueError(
            f"Expected one layout; {files.root} holds both NIfTI and DICOM. Name the layout in "
            "site.yaml, or give folders of one kind."
        )
    if dicom:
        return "dicom"
    subjects = any(_subject_place(path.relative_to(files.root)) is not None for path in files.kinds)
    return "bids" if files.root / "dataset_description.json" in files.kinds or subjects else "plain"


def _subject_place(below: PurePath) -> int | None:
    """Depth of the `sub-…` folder of a raw BIDS file: at the root, or below `rawdata` or a data set of its
    own."""
    for depth, part in enumerate(below.parts[:-1]):
        if part in MADE:
            return None
        if subject_of(part):
            return depth
    return None


def not_nifti(path: Path, kind: FileKind) -> Exclusion:
    """Why a file that does not claim to be NIfTI is no candidate."""
    detail = ""
    if kind == "nifti":
        reason = Reason.WRONG_EXTENSION
    elif kind == "dicom":
        reason = Reason.UNSUPPORTED_FORMAT
    elif path.suffix.lower() in SIDECAR_SUFFIXES or path.name in SIDECAR_NAMES:
        reason = Reason.SIDECAR
        detail = "a table that is not read" if path.suffix.lower() in TABLE_SUFFIXES else ""
    elif path.suffix.lower() in OTHER_IMAGES or path.name.lower().endswith((".tar.gz", ".mgh.gz")):
        reason = Reason.UNSUPPORTED_FORMAT
    else:
        reason = Reason.EMPTY if kind == "empty" else Reason.NOT_A_SCAN
    return Exclusion(path, reason, detail)


def patients_of(paths: Sequence[PurePath], stems: Sequence[PurePath], rules: LayoutRules) -> Reading:
    """Whose the files at `paths` (below the root) are: by the site's pattern, else by all paths together;
    `stems` are the paths without the files' extensions."""
    if rules.patient_pattern:
        return patients_by_pattern(paths, rules.patient_pattern)
    return patients_by_path(stems)


def map_of(paths: Sequence[PurePath], reading: Reading, more: Sequence[str] = ()) -> PatientMap:
    """The map from scan to patient that a reading makes, with every doubt about it."""
    named = {
        readable(path.as_posix()): whose.patient for path, whose in zip(paths, reading.whose, strict=True)
    }
    doubts = dict.fromkeys([*reading.doubts, *more, *doubts_of(named)])
    if nameless := sum(not patient for patient in named.values()):
        doubts[f"{nameless} of {len(named)} scans have no patient, and are left out."] = None
    return PatientMap(reading.rule, named, tuple(doubts))


def _without_made(files: Files, scans: list[Path]) -> list[Path]:
    """Those that no software made of another; the others are excluded."""
    made = set(made_from_others(scans))
    files.exclusions.extend(Exclusion(path, Reason.DERIVATIVE) for path in scans if path in made)
    return [path for path in scans if path not in made]


def _plain(files: Files, rules: LayoutRules) -> Found:
    root, scans = files.root, []
    for path, kind in files.kinds.items():
        if is_nifti_name(path):
            scans.append(path)
        else:
            files.exclusions.append(not_nifti(path, kind))
    scans = _without_made(files, scans)
    labels = [path for path in scans if label_folder(path, root) is not None or is_label_name(path)]
    if len(labels) == len(scans):  # a folder called for what is in all of it (ms_lesions/P001/…)
        labels = [path for path in scans if is_label_name(path)]
    images = sorted(set(scans) - set(labels))
    return _with_names(files, "plain", images, labels, find_images(labels, images, root), rules)


def _with_names(
    files: Files, layout: Layout, images: list[Path], labels: list[Path], offers: Offers, rules: LayoutRules
) -> Found:
    """Candidates of NIfTI images: patient, contrast, label and covariates of each."""
    root = files.root
    below = [image.relative_to(root) for image in images]
    stems = [path.with_name(nifti_stem(path)) for path in below]
    reading = patients_of(below, stems, rules)
    chosen, more = choose_labels(labels, offers, rules.label_pattern)
    if layout == "bids":
        local = contrasts_of_bids([stem.name for stem in stems])
    else:
        patients = [whose.patient for whose in reading.whose]
        local = contrasts_of_files(stems, patients, rules.names, root)
    covariates, joins, exclusions = _joined(files, stems, reading.whose, layout)
    candidates = [
        Candidate(image, (image,), whose.patient, rules.names.of(name), chosen.get(image), extra, whose.visit)
        for image, whose, name, extra in zip(images, reading.whose, local, covariates, strict=True)
    ]
    return Found(layout, candidates, exclusions + more, map_of(below, reading), joins)


def _joined(
    files: Files, stems: Sequence[PurePath], whose: Sequence[Whose], layout: Layout
) -> tuple[list[Covariates], list[Join], list[Exclusion]]:
    """Covariates of each scan from the data set's table, which then is no sidecar."""
    names = ["participants.tsv", "covariates.csv"]
    tops = {
        files.root.joinpath(*stem.parts[:place])
        for stem in stems
        if layout == "bids" and (place := _subject_place(stem)) is not None
    }
    folders = [files.root, *sorted(tops - {files.root})]
    tables = [
        folder / name
        for name in (names if layout == "bids" else reversed(names))
        for folder in folders
        if folder / name in files.kinds
    ]
    if not tables:
        return [{} for _ in stems], [], files.exclusions
    scans = [
        (one.patient, next((part for part in stem.parts if part.startswith("sub-")), ""), stem.name)
        for one, stem in zip(whose, stems, strict=True)
    ]
    covariates, join = join_covariates(tables[0], scans)
    read = Exclusion(tables[0], Reason.TABLE, join.summary)
    return covariates, [join], [read if one.path == tables[0] else one for one in files.exclusions]


def _bids(files: Files, rules: LayoutRules) -> Found:
    images: list[Path] = []
    labels: list[Path] = []
    for path, kind in files.kinds.items():
        below = path.relative_to(files.root)
        if not is_nifti_name(path):
            files.exclusions.append(not_nifti(path, kind))
        elif _subject_place(below) is not None:
            (labels if is_label_name(path) else images).append(path)
        elif "derivatives" in below.parts[:-1] and (
            label_folder(path, files.root) is not None or is_label_name(path)
        ):
            labels.append(path)
        else:
            loose = len(below.parts) == 1
            files.exclusions.append(Exclusion(path, Reason.NO_PATIENT if loose else Reason.DERIVATIVE))
    images = _without_made(files, images)
    return _with_names(files, "bids", images, labels, _bids_labels(images, labels), rules)


def _bids_labels(images: Sequence[Path], labels: Sequence[Path]) -> Offers:
    """The image that each label's name extends; else (sub-x_desc-y_dseg) the one whose entities it has."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    by_entities: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[nifti_stem(image)].append(image)
        by_entities[nifti_stem(image).rpartition("_")[0]].append(image)
    offers: Offers = defaultdict(list)
    for label in labels:
        stem = nifti_stem(label)
        cuts = [cut for cut in range(len(stem) - 1, 0, -1) if stem[cut] == "_" and stem[:cut] in by_stem]
        if cuts:
            found, added = by_stem[stem[: cuts[0]]], stem[cuts[0] + 1 :]
        else:
            entities, _, added = _BIDS_OF_LABELS.sub("", stem).rpartition("_")
            found = by_entities.get(entities, [])
        if len(found) == 1:
            offers[found[0]].append((added, label))
    return offers
