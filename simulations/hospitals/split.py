"""One folder of real scans divided among simulated hospitals.

By intensity: the level of a scan is the decimal logarithm of the 99.9th percentile of its voxels, that of a
patient the median of her scans'. The sorted levels are cut into contiguous groups with the least sum of
squared distances to their group's mean (Fisher 1958, doi:10.1080/01621459.1958.10501479, "natural breaks"),
no group smaller than a tenth of an equal share. No draw is involved. By appearance: what scans look like
after windowing (`appearance.py`). At random: patients dealt by the seed.

A patient is at one hospital. With styles on top, each scan that can be read is restyled by its hospital's
scanner (`scans.scan_image`) and written anew with its label; otherwise hospitals get manifests and nothing is
written. A split of one hospital's scans is a simulation of several hospitals, and is to be called one.
"""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from client.scans.layouts import Candidate, LayoutRules, survey
from forms.json_text import fingerprint_of
from meduet_models.seeds import digest_of
from meduet_models.weights import sha256_of_file
from scans.nifti import nifti_stem
from scans.scans import Scan, UnusableScan
from scans.volumes import read_files, read_label
from simulations.hospitals.appearance import appearance, by_appearance
from simulations.hospitals.manifests import read_record, write_left_out, write_manifest, write_record
from simulations.hospitals.phantom import Progress
from simulations.hospitals.plans import TRUTH, Hospital, SplitHospitals, hospital_names
from simulations.phantoms.scanners import Acquisition, Scanner, draw_acquisition, draw_scanner, with_settings
from simulations.phantoms.scans import Affine, scan_image, write_labels, write_scan
from storage.files import private_folder

RESTYLING = 1
"""Counts changes of the restyling's mathematics; files of another generation are made anew."""
SMALLEST_SHARE = 0.1
"""Least size of an intensity group, as a share of patients over hospitals."""


def make_split(plan: SplitHospitals, folder: Path, progress: Progress | None = None) -> list[Hospital]:
    """Divide `plan.root` among hospitals below `folder`; `ValueError` for fewer patients than hospitals."""
    names = hospital_names(plan.names, plan.num_hospitals)
    root = Path(plan.root)
    if not root.is_dir():
        raise ValueError(f"Expected a folder of scans to split; {root} is not a folder.")
    rules = LayoutRules(patient_pattern=plan.patient_pattern, label_pattern=plan.label_pattern)
    found = survey(root, "auto", rules)
    candidates, exclusions = found.candidates, found.exclusions
    if len({candidate.path for candidate in candidates}) < len(candidates):
        raise ValueError(
            f"Expected each DICOM series below {root} in a folder of its own, so that it can be named."
        )
    patients = sorted({candidate.patient for candidate in candidates})
    if len(patients) < plan.num_hospitals:
        raise ValueError(
            f"Expected at least one patient for each of {plan.num_hospitals} hospitals; {root} has "
            f"{len(patients)}."
        )
    steps = len(candidates) * (plan.by != "random") + len(candidates) * plan.styles_on_top
    report = _Count(steps, progress)
    match plan.by:
        case "intensity":
            place = by_intensity(_levels(candidates, report), plan.num_hospitals)
        case "appearance":
            place = by_appearance(_appearances(candidates, report), plan.num_hospitals)
        case "random":
            rng = np.random.default_rng(np.random.SeedSequence(plan.seed, spawn_key=(0,)))
            place = {str(p): i % plan.num_hospitals for i, p in enumerate(rng.permutation(patients))}
    hospitals = []
    for index, name in enumerate(names):
        mine = [candidate for candidate in candidates if place[candidate.patient] == index]
        truth = folder / TRUTH / name if plan.styles_on_top else None
        if truth is not None:
            scanner = split_scanner(plan, index, name)
            write_record(truth / "scanner.json", dataclasses.asdict(scanner) | {"signals": scanner.signals})
            mine = _restyled(mine, scanner, root, folder / name, truth, plan.seed, report)
        write_manifest(folder / name / "manifest.csv", mine)
        hospitals.append(Hospital(name, folder / name, "manifest", truth))
    write_left_out(folder, root, exclusions)
    return hospitals


def split_scanner(plan: SplitHospitals, index: int, name: str) -> Scanner:
    """The scanner put on top at hospital number `index`: drawn, then changed as the plan says."""
    rng = np.random.default_rng(np.random.SeedSequence(plan.seed, spawn_key=(1, index)))
    drawn = draw_scanner(rng, index, name)
    return with_settings(drawn, plan.scanners[index]) if index < len(plan.scanners) else drawn


def by_intensity(levels: dict[str, float], num_groups: int) -> dict[str, int]:
    """Group number of every patient, from the patients' levels; darkest group first."""
    patients = sorted(levels, key=lambda patient: (levels[patient], patient))
    smallest = max(1, round(SMALLEST_SHARE * len(patients) / num_groups))
    ends = natural_breaks(np.array([levels[p] for p in patients]), num_groups, smallest)
    groups = np.searchsorted(ends, np.arange(len(patients)), side="right")
    return {patient: int(group) for patient, group in zip(patients, groups, strict=True)}


def natural_breaks(ordered: NDArray[np.float64], num_groups: int, smallest: int) -> list[int]:
    """Ends (exclusive) of the contiguous groups of `ordered` [n] with the least within-group sum of squares.

    Exact, by dynamic programming over prefixes. Every group has at least `smallest` members; the caller sees
    to it that `num_groups * smallest <= n`.
    """
    n = len(ordered)
    assert num_groups * smallest <= n
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    squares = np.concatenate([[0.0], np.cumsum(ordered**2)])
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _ in range(num_groups):
        following, choice = np.full(n + 1, np.inf), np.zeros(n + 1, int)
        for end in range(smallest, n + 1):
            starts = np.arange(end - smallest + 1)
            within = squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / (end - starts)
            total = best[starts] + within
            choice[end] = int(np.argmin(total))
            following[end] = total[choice[end]]
        best = following
        choices.append(choice)
    ends = [n]
    for choice in reversed(choices[1:]):
        ends.append(int(choice[ends[-1]]))
    return ends[::-1]


class _Count:
    """Scans done, told to whoever listens."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def one_more(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _levels(candidates: Sequence[Candidate], report: _Count) -> dict[str, float]:
    """Level of every patient. A patient none of whose scans can be read goes with the darkest: wherever she
    is, the site's intake will say why she takes no part.
    """
    found: dict[str, list[float]] = {candidate.patient: [] for candidate in candidates}
    for candidate in candidates:
        try:
            bright = float(np.percentile(read_files(candidate.files).array, 99.9))
        except UnusableScan:
            bright = 0.0
        if bright > 0:
            found[candidate.patient].append(float(np.log10(bright)))
        report.one_more()
    darkest = min((level for levels in found.values() for level in levels), default=0.0)
    return {patient: float(np.median(levels or [darkest])) for patient, levels in found.items()}


def _appearances(candidates: Sequence[Candidate], report: _Count) -> dict[str, NDArray[np.float64]]:
    """Mean appearance of every patient's scans. A patient none of whose scans can be read looks like the
    mean of all: wherever she is, the site's intake will say why she takes no part.
    """
    found: dict[str, list[NDArray[np.float64]]] = {candidate.patient: [] for candidate in candidates}
    for candidate in candidates:
        with contextlib.suppress(UnusableScan):
            found[candidate.patient].append(appearance(read_files(candidate.files)))
        report.one_more()
    every = [one for own in found.values() for one in own]
    if not every:
        raise ValueError("Expected a scan that can be read, to split by appearance; got none.")
    return {patient: np.mean(own or every, axis=0) for patient, own in found.items()}


def _restyled(
    candidates: Sequence[Candidate],
    scanner: Scanner,
    root: Path,
    data: Path,
    truth: Path,
    seed: int,
    report: _Count,
) -> list[Candidate]:
    """The candidates with their files replaced by restyled ones; what cannot be read stays as it is."""
    restyled, wanted = [], set()
    for candidate in candidates:
        below = candidate.path.relative_to(root).as_posix()
        # Drawn from the scan's name: a scan more or less in the folder changes no other scan.
        name = int.from_bytes(digest_of(below)[:8], "big")
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, name)))
        acquisition = draw_acquisition(rng, scanner)
        stem = f"{nifti_stem(candidate.path)}-{name % 16**6:06x}"
        files = _keep_or_restyle(candidate, scanner, acquisition, data, truth / f"{stem}.json", below)
        restyled.append(candidate if files is None else files)
        wanted.add(stem)
        report.one_more()
    for place, ending in ((data / "images", ".nii.gz"), (data / "labels", ".nii.gz"), (truth, ".json")):
        for path in place.iterdir() if place.is_dir() else ():
            stem = path.name.removesuffix(ending)
            if _CUT_SHORT.fullmatch(path.name) or (_OURS.fullmatch(stem) and stem not in wanted):
                path.unlink()
    return restyled


_OURS = re.compile(r".+-[0-9a-f]{6}")
_CUT_SHORT = re.compile(r"\..+-[0-9a-f]{6}\..+")  # a file whose writing was


def _keep_or_restyle(
    candidate: Candidate, scanner: Scanner, acquisition: Acquisition, data: Path, truth: Path, below: str
) -> Candidate | None:
    """The restyled candidate, made unless it is there and matches; None when the original cannot be read."""
    image = data / "images" / f"{truth.stem}.nii.gz"
    label = data / "labels" / f"{truth.stem}.nii.gz" if candidate.label is not None else None
    sources = [*candidate.files, *([candidate.label] if candidate.label is not None else [])]
    drawn = {
        "restyling": RESTYLING,
        "scanner": dataclasses.asdict(scanner),
        "acquisition": dataclasses.asdict(acquisition),
        "sources": [sha256_of_file(path) for path in sources if path.is_file()],
    }
    draw_sha256 = fingerprint_of(drawn)
    written = [path for path in (image, label) if path is not None]
    record = read_record(truth)
    files = {path.parent.name: sha256_of_file(path) for path in written if path.is_file()}
    if record.get("draw_sha256") != draw_sha256 or record.get("files") != files:
        try:
            scan = read_files(candidate.files)
            values, affine = _ras(scan)
            styled = scan_image(values, scanner, acquisition)
            labels = _ras(read_label(candidate.label)) if candidate.label is not None else None
        except UnusableScan:
            return None
        for path in written:
            private_folder(path.parent)
        write_scan(image, styled, affine, scanner)
        if label is not None and labels is not None:
            write_labels(label, labels[0].astype(np.int16), labels[1], scanner)
        record = {"draw_sha256": draw_sha256, "files": _hashes(written), "source": below}
        write_record(truth, record | {"acquisition": dataclasses.asdict(acquisition)})
    return dataclasses.replace(candidate, path=image, files=(image,), label=label)


def _hashes(written: Sequence[Path]) -> dict[str, str]:
    """Hashes of the files that are there, by kind (images, labels)."""
    return {p.parent.name: sha256_of_file(p) for p in written if p.is_file()}


def _ras(scan: Scan) -> tuple[NDArray[Any], Affine]:
    """Voxels and affine with the axes in the order right, anterior, superior; lossless."""
    turn = io_orientation(scan.affine)
    turned = apply_orientation(scan.array, turn)
    return turned, scan.affine @ inv_ornt_aff(turn, scan.array.shape)
