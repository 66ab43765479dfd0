"""DICOM series as candidates, and whose they are: by PatientID with its issuer, else by the folders.

A PatientID that software writes where it took the id away (`ANONYMOUS`, `***`, nothing) names nobody: then
the folders tell, by the rule of `client/scans/patients.py`. One id with several birth dates or sexes stays
one patient, which never puts one person into two splits, and is said. One id of two issuers is two patients;
where a series does not say the issuer, it has none.

Does not do: group frames (`scans/stacks.py`).
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath

from client.scans.files import Files
from client.scans.layouts import Candidate, Found, LayoutRules, map_of, not_nifti
from client.scans.names import is_placeholder, readable
from client.scans.patients import Reading, Whose, examples, patients_by_path, patients_by_pattern
from scans.dicom import Series, find_series
from scans.nifti import is_nifti_name
from scans.scans import Exclusion, Reason

BY_ID = "a patient is the PatientID of the DICOM header, with its issuer"


def survey_dicom(files: Files, rules: LayoutRules) -> Found:
    """Candidates of all series; every other file is an exclusion. Reads headers only."""
    exclusions = files.exclusions
    for path, kind in files.kinds.items():
        if kind != "dicom":
            wrong = is_nifti_name(path) and kind in ("gzip", "nifti")
            exclusions.append(Exclusion(path, Reason.UNSUPPORTED_FORMAT) if wrong else not_nifti(path, kind))
    found, left_over = find_series([path for path, kind in files.kinds.items() if kind == "dicom"])
    exclusions += left_over
    by_uid = defaultdict(list)
    for one in found:
        by_uid[one.uid].append(one)
    series = []
    for one in found:
        folder = one.files[0].parent  # where other volumes of the series are volumes of their own
        elsewhere = [other for other in by_uid[one.uid] if other.files[0].parent != folder]
        if any(other.patient == one.patient and not other.instances & one.instances for other in elsewhere):
            detail = f"{len({other.files[0].parent for other in elsewhere}) + 1} folders"
            exclusions.append(Exclusion(folder, Reason.SPLIT_SERIES, detail, one.files))
        else:
            series.append(one)
    paths = [one.files[0].relative_to(files.root) for one in series]
    reading = whose_series(series, paths, rules)
    candidates = [
        Candidate(
            one.files[0].parent, one.files, whose.patient, rules.names.of_series(one.names), visit=whose.visit
        )
        for one, whose in zip(series, reading.whose, strict=True)
    ]
    return Found("dicom", candidates, exclusions, map_of(paths, reading, _persons(series, reading.whose)))


def whose_series(series: Sequence[Series], paths: Sequence[PurePath], rules: LayoutRules) -> Reading:
    """Whose each series is; `paths`: that of its first file, below the root."""
    if rules.patient_pattern:
        reading = patients_by_pattern(paths, rules.patient_pattern)
        studies = [Whose(own.patient, one.study) for one, own in zip(series, reading.whose, strict=True)]
        return Reading(reading.rule, studies)
    issuers: dict[str, set[str]] = defaultdict(set)
    for one in series:
        issuers[one.patient].add(one.issuer)
    whose, doubts = [], []
    for one in series:
        several = len(issuers[one.patient] - {""}) > 1
        patient = "" if is_placeholder(one.patient) else readable(one.patient)
        if several and patient:
            patient = f"{patient} ({readable(one.issuer)})" if one.issuer else ""
        whose.append(Whose(patient, one.study))
    blank = [place for place, one in enumerate(series) if is_placeholder(one.patient)]
    if not blank:
        return Reading(BY_ID, whose)
    # the folders of all series together show which level is a patient's; a series' own folder has its name
    folders = patients_by_path([path.parent / "image" for path in paths])
    with_patient = {place for place in blank if folders.whose[place].patient}
    for place in with_patient:
        whose[place] = Whose(folders.whose[place].patient, series[place].study)
    ids = {series[place].patient for place in blank}
    named = f"PatientID {examples(filter(None, ids))}" if any(ids) else "an empty PatientID"
    doubts.append(
        f"{len(blank)} series have {named}, which names nobody: their folders tell ({folders.rule})."
    )
    doubts += folders.doubts
    mixed = {whose[place].patient for place in with_patient} & {
        w.patient for i, w in enumerate(whose) if i not in with_patient
    }
    if mixed:
        doubts.append(f"A folder and a PatientID say the same patient: {examples(mixed)}.")
    return Reading(f"{BY_ID}; where it names nobody, {folders.rule}", whose, doubts)


def _persons(series: Sequence[Series], whose: Sequence[Whose]) -> list[str]:
    """What headers say against the map: one patient with several birth dates or sexes."""
    doubts = []
    for what, values in (("birth dates", "born"), ("sexes", "sex")):
        values_of: dict[str, set[str]] = defaultdict(set)
        for one, owner in zip(series, whose, strict=True):
            if owner.patient and getattr(one, values):
                values_of[owner.patient].add(getattr(one, values))
        if several := [patient for patient, found in values_of.items() if len(found) > 1]:
            count = f"{len(several)} patients have several {what}"
            doubts.append(f"{count}, and each is taken for one: {examples(several)}.")
    return doubts
