"""What `meduet-site check` says of the data folder: who the patients are, what is in, what is not and why.

Each finding is a name, a verdict, what was found and what to do. These lines name files and patients where a
person must see them to decide: they are the site's own screen, and nothing of them leaves it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from client.consent.confirmation import CURE, unconfirmed
from client.scans.cohort import Cohort
from client.scans.layouts import Found
from client.scans.patients import PatientMap, shown
from client.scans.tables import Join
from client.settings import SiteConfig
from scans.scans import Exclusion, Note, Reason
from scans.volume_plan import VolumePlan

Line = tuple[str, Literal["ok", "look", "failed"], str, str]
"""What was looked at, the verdict, what was found, what to do."""
CURES = {
    Reason.UNREADABLE: "Give this user the right to read them.",
    Reason.NOT_FETCHED: "Their content is not here: datalad get (or git annex get, git lfs pull).",
    Reason.BROKEN_LINK: "Mount or copy what the links lead to.",
    Reason.LINKED_FILE: "Links lead out of the data root; follow_links: true in site.yaml follows them.",
    Reason.LINKED_FOLDER: "Links to folders; follow_links: true in site.yaml follows them.",
    Reason.MISSING_FILE: "Paths of the manifest start at its own folder; correct those that lead nowhere.",
    Reason.NO_PATIENT: "Set patient_pattern in site.yaml, or name patients in a manifest.",
    Reason.DERIVATIVE: "Made from other scans. Of BIDS: set data_root to the folder of sub-… folders.",
    Reason.NO_SUCH_MODALITY: "Say in modality_names which of the site's names is the plan's.",
    Reason.NOT_IN_MANIFEST: "Add them to the manifest, or leave them out.",
    Reason.LABEL_MAP: "They look like segmentations: name them so (labels/, …_seg), or leave them out.",
    Reason.LEFT_IN_DOUBT: "sform and qform contradict each other about left: convert them again.",
    Reason.SIZES_CONTRADICT: "Two sources say different voxel sizes: convert them again.",
    Reason.AMBIGUOUS_FRAMES: "Their detail in exclusions.csv names the attribute; export the series again.",
    Reason.NOT_A_FILE: "Pipes, sockets and devices are never opened.",
}
"""What helps, by reason."""
NOTED = {
    Note.UNIT: "are in another unit than mm, which is converted",
    Note.SFORM_WITHOUT_SCALE: "have a sform of 1 x 1 x 1 mm and a qform that says otherwise, which is taken",
    Note.TWO_PLACES: "lie elsewhere by sform than by qform; the sform is taken",
    Note.PIXDIM_IGNORED: "have other sizes by sform than by pixdim; the sform is taken",
    Note.NEGATIVE_SPACING: "have a size below zero in pixdim, whose sign is ignored",
    Note.TRAILING_BYTES: "have bytes after the end of the compressed stream, which are ignored",
    Note.NAN_BACKGROUND: "have NaN around the patient, which become 0",
    Note.TILTED: "have slices sheared against each other (a tilted gantry), which are resampled to a "
    "straight stack",
    Note.ROUNDED_POSITIONS: "have slices off a regular grid by less than a tenth of the spacing, which is "
    "taken for rounding",
    Note.ORDER_BY_NUMBER: "have volumes that only InstanceNumber tells apart, in whole blocks; it decides",
    Note.INVERTED: "are MONOCHROME1, meant to be seen with the lowest value brightest; taken as stored",
    Note.NOT_HOUNSFIELD: "are read as CT and cannot be HU by their range (nothing below water, or much below "
    "air); values are taken as stored",
}
"""What is odd about scans that are read nonetheless, and the rule that was followed."""
MOST_LINES = 6
LEAST_KEPT = 0.95
"""Share of a scan within the crop below which a person should look."""


def data_line(found: Found) -> Line:
    """What the folder holds, by names and headers alone; nothing found comes with the reasons."""
    what = f"{len(found.candidates)} files or series that may be scans"
    contrasts = Counter(candidate.modality for candidate in found.candidates)
    if len(contrasts) > 1:
        what += ", of contrasts " + ", ".join(
            f"{shown(name) or 'unnamed'} {count}" for name, count in contrasts.most_common(MOST_LINES)
        )
    reasons = Counter(one.reason for one in found.exclusions)
    cures = [CURES[reason] for reason in _unwanted(reasons) if reason in CURES]
    if not found.candidates:
        detail = f"{what}; {by_reason(found.exclusions) or 'the folder is empty'}"
        return (
            "data folder",
            "failed",
            detail,
            " ".join(cures or ["Check data_root and layout; is the folder mounted?"]),
        )
    troubles = [
        reason for reason in _unwanted(reasons) if reason in CURES and reason is not Reason.DERIVATIVE
    ]
    if not troubles:
        return "data folder", "ok", what, ""
    detail = ", ".join(f"{reason.value} {reasons[reason]}" for reason in troubles)
    return "data folder", "look", f"{what}; {detail}", " ".join(CURES[reason] for reason in troubles)


def _unwanted(reasons: Counter[Reason]) -> list[Reason]:
    return [reason for reason, _ in reasons.most_common() if reason is not Reason.NO_SUCH_MODALITY]


def by_reason(exclusions: Iterable[Exclusion]) -> str:
    """Excluded files, counted by reason."""
    counted = Counter[Reason]()
    for one in exclusions:
        if one.reason is not Reason.TABLE:
            counted[one.reason] += len(one.all_files)
    return ", ".join(f"{reason.value} {count}" for reason, count in counted.most_common())


def patient_lines(found: PatientMap, config: SiteConfig) -> Iterator[Line]:
    """The guess, its rule and every doubt; once it was confirmed, count and rule, which name nobody."""
    guess = f"{found.guess()}. Rule: {found.rule}"
    problem = unconfirmed(config.state_dir, config.data_root, found)
    if not found.num_patients:
        yield "patients", "failed", guess, CURES[Reason.NO_PATIENT]
        return
    if not problem:
        yield "patients", "ok", f"{found.num_patients} patients, as confirmed. Rule: {found.rule}", ""
        return
    yield "patients", "look", f"{guess}; {problem}", f"start refuses until then. {CURE}"
    for doubt in found.doubts:
        yield "patients", "look", doubt, "If it is wrong, set patient_pattern in site.yaml."


def table_lines(joins: Sequence[Join], exclusions: Sequence[Exclusion]) -> Iterator[Line]:
    """Which tables were read, what matched, and which were not read."""
    for join in joins:
        verdict: Literal["ok", "look"] = "ok" if join.complete else "look"
        advice = "" if join.complete else "Rows and scans that do not match have no covariates."
        yield "table", verdict, f"{shown(join.table.name)}, {join.summary}", advice
    unread = [one.path.name for one in exclusions if one.detail == "a table that is not read"]
    if unread:
        names = ", ".join(map(shown, sorted(set(unread))[:MOST_LINES]))
        advice = (
            "Covariates are read from covariates.csv or participants.tsv at the data root, or the manifest."
        )
        yield "table", "look", f"{len(unread)} tables are not read: {names}", advice


def note_lines(notes: Sequence[str]) -> Iterator[Line]:
    """What else was met."""
    for note in notes[:MOST_LINES]:
        yield "data folder", "look", note, ""
    if len(notes) > MOST_LINES:
        yield "data folder", "look", f"and {len(notes) - MOST_LINES} more of this kind", ""


def cohort_lines(cohort: Cohort, volumes: VolumePlan) -> Iterator[Line]:
    """What only the scans themselves say: contrasts that were not selected, the crop, labels without a
    place."""
    others = Counter(one.detail for one in cohort.exclusions if one.reason is Reason.NO_SUCH_MODALITY)
    if others:
        detail = ", ".join(
            f"{shown(name) or 'unnamed'} {count}" for name, count in others.most_common(MOST_LINES)
        )
        asked = ", ".join(volumes.modalities or (volumes.modality,))
        advice = "" if cohort.scans else CURES[Reason.NO_SUCH_MODALITY]
        yield (
            "contrasts",
            "ok" if cohort.scans else "look",
            f"not selected by the plan ({asked}): {detail}",
            advice,
        )
    cut = [scan.kept for scan in cohort.scans if scan.kept < LEAST_KEPT]
    if cut:
        shape = " x ".join(map(str, volumes.shape))
        detail = (
            f"{len(cut)} of {len(cohort.scans)} scans reach outside the plan's {shape} voxels, which keep "
            f"{sum(cut) / len(cut):.0%} of what is bright in them, {min(cut):.0%} at least"
        )
        yield (
            "crop",
            "look",
            detail,
            "A model sees nothing outside: ask the centre for a larger volumes.shape, or for extent: scan.",
        )
    for note, sentence in NOTED.items():
        if noted := [scan for scan in cohort.scans if note in scan.notes]:
            example = shown(noted[0].path.name)
            advice = "Look at one in a viewer; cohort.csv lists all of them in its column notes."
            yield (
                note.value.replace("_", " "),
                "look",
                f"{len(noted)} scans {sentence}, e.g. {example}",
                advice,
            )
    if placed := sum(scan.placed_label for scan in cohort.scans):
        detail = f"{placed} labels do not say where they lie; they are taken to lie as their images"
        yield "labels", "look", detail, "Compare one with its image in a viewer."
    misfits = [one for one in cohort.exclusions if one.reason is Reason.LABEL_NOT_INTEGER]
    if misfits:
        detail = f"{len(misfits)} labels are not integers: {misfits[0].detail}"
        yield "labels", "look", detail, "Save them as integers."


def closing(found: Found | Cohort, rule: PatientMap, looks: Sequence[str]) -> Iterator[str]:
    """The last lines: files seen, in, excluded by reason; patients and their rule; what to look at."""
    if isinstance(found, Cohort):
        scans = [file for scan in found.scans for file in scan.files]
        labels = {scan.label_path for scan in found.scans} - {None}
        inside = f"in: {len(scans)} files of {len(found.scans)} scans, {len(labels)} labels"
        num_patients = len(found.patients())
    else:
        scans = [file for candidate in found.candidates for file in candidate.files]
        labels = {candidate.label for candidate in found.candidates} - {None}
        inside = f"maybe in: {len(scans)} files of {len(found.candidates)} scans, {len(labels)} labels"
        num_patients = rule.num_patients
    tables = sum(one.reason is Reason.TABLE for one in found.exclusions)
    others = [one for one in found.exclusions if one.reason is not Reason.TABLE]
    excluded = sum(len(one.all_files) for one in others)
    seen = len(scans) + len(labels) + tables + excluded
    reasons = by_reason(others)
    yield (
        f"Files: {seen} seen; {inside}; {tables} tables read; {excluded} left out"
        + (f" ({reasons})." if reasons else ".")
    )
    yield f"Patients: {num_patients}, by this rule: {rule.rule}."
    if looks:
        yield f"To look at: {', '.join(dict.fromkeys(looks))}."
