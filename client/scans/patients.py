"""Who is the patient: one stated rule for a whole data folder, shown to a person before anything leaves.

Patients carry the split, the minimum cohort and the privacy unit, so a wrong guess breaks all three. The rule
is told from all names together, never from one: `sub-…` where BIDS says so; else the topmost folder that
varies and is no date, visit, contrast, site or group; else what is left of the files' names. Where nothing is
left, nothing is guessed: the scan has no patient. Where two readings are possible, the one that never takes
one person for two is chosen, and the doubt is said. A site confirms the map once
(`client/consent/confirmation.py`).

Does not do: read files. DICOM headers and manifests name patients themselves, and only bring their doubts
here.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath

from client.scans.names import (
    YEAR,
    Kind,
    alike,
    all_short_dates,
    channels_of,
    contrast_of,
    is_placeholder,
    kind_of,
    person_in,
    readable,
    shape_of,
    subject_of,
    visit_in,
)

BY_PATTERN = "a patient is group 1 of patient_pattern (site.yaml)"
SHOWN = 3
"""Examples of a doubt that are shown."""
_RUN = re.compile(r"(.*\d[A-Za-z]?)[-_. ]+(\d{1,3})")
"""An id that ends in a digit, and a number behind it: a person's second scan, or a site's second person."""
_NESTED: frozenset[Kind] = frozenset(("id", "group", "site"))
"""Kinds of folder below a patient's that could be patients themselves."""
_SERIES = re.compile(r"\d{1,2}|s\d{4,6}|i\d{5,7}|(?:se|st|ser|std|im|img)\d+", re.IGNORECASE)
"""A folder or file of one study: 1, and ADNI's S13893 and I45128."""
_ONE = "All scans are taken for one patient."


@dataclass(frozen=True)
class Whose:
    """Patient and visit of one scan."""

    patient: str
    """Empty: nothing says."""
    visit: str = ""
    """What tells this study of the patient from others, as written; empty where nothing does."""


@dataclass(frozen=True)
class Reading:
    """What a rule makes of a folder: whose each path is, in their order, and what is doubtful about it."""

    rule: str
    whose: list[Whose]
    doubts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PatientMap:
    """Which scan is whose, and by which rule. Names patients and paths; stays at the site."""

    rule: str = "no scan was found"
    """One sentence."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Path below the data root (of a DICOM series: of its first file) to patient; "" where nothing says."""
    doubts: tuple[str, ...] = ()
    """What a person should look at: a sentence each, with examples."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the rule and of every scan with its patient, 64 hex digits."""
        rule_and_patients = json.dumps([self.rule, sorted(self.patients.items())])
        return hashlib.sha256(rule_and_patients.encode()).hexdigest()

    @property
    def num_patients(self) -> int:
        """Different patients."""
        return len({patient for patient in self.patients.values() if patient})

    def guess(self) -> str:
        """The guess in words: "8 patients, e.g. P001/2019-03-01/t1.nii.gz is patient P001"."""
        named = [(path, patient) for path, patient in self.patients.items() if patient]
        if not named:
            return "no patient: nothing says whose the scans are"
        path, patient = min(named)
        plural = "patients" if self.num_patients > 1 else "patient"
        return f"{self.num_patients} {plural}, e.g. {shown(path)} is patient {shown(patient)}"


def rows_by_patient(patients: Sequence[str], rows: Iterable[int]) -> dict[str, list[int]]:
    """The rows of each patient; patients, and the rows of each, in the order of `rows`. `patients`: whose a
    row is."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(patients[row], []).append(int(row))
    return found


def shown(text: str) -> str:
    """A name as it may be printed: no control character reaches a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in readable(text))


def examples(names: Iterable[str]) -> str:
    """The first few of these names, for a sentence."""
    listed = sorted(set(names))
    return ", ".join(map(shown, listed[:SHOWN])) + (", …" if len(listed) > SHOWN else "")


def patients_by_pattern(paths: Sequence[PurePath], pattern: str) -> Reading:
    """Group 1 of the site's `patient_pattern`, searched in each path below the root.

    Raises `ValueError` when it matches no path at all: a typing mistake would exclude every scan.
    """
    found = [re.search(pattern, readable(path.as_posix())) for path in paths]
    if paths and not any(match is not None and match.group(1) for match in found):
        raise ValueError(
            f"Expected patient_pattern to match a scan's path below the data root; {pattern!r} matches "
            f"none of {len(paths)}, e.g. {shown(min(paths).as_posix())}. Correct it in site.yaml."
        )
    whose = [
        Whose((match.group(1) or "") if match else "", _visit([readable(part) for part in path.parts]))
        for match, path in zip(found, paths, strict=True)
    ]
    return Reading(BY_PATTERN, whose)


def patients_by_path(paths: Sequence[PurePath]) -> Reading:
    """The rule that the paths themselves suggest. `paths`: below the root, files without extension."""
    if not paths:
        return Reading("no scan was found", [])
    clean = [tuple(readable(part) for part in path.parts) for path in paths]
    if all(any(map(subject_of, parts)) for parts in clean):
        return _by_subject(clean)
    levels = _levels(clean)
    if not levels:
        return _by_name(clean)
    if _six_digits(clean, levels[0]) and not all(parts[levels[0]] in parts[-1] for parts in clean):
        others = [level for level in levels[1:] if not _six_digits(clean, level)]
        named = {whose.patient for whose in _by_name(clean).whose}
        if others or (len(named) > 1 and "" not in named):
            shown = examples(parts[levels[0]] for parts in clean)
            doubt = f"Are these dates or ids? {shown}. Set patient_pattern."
            return Reading(
                "nothing says whose they are", [Whose("", _visit(parts)) for parts in clean], [doubt]
            )
    return _by_folder(clean, levels[0])


def doubts_of(whose: Mapping[str, str]) -> list[str]:
    """What may be wrong with a map from scan to patient, whatever its rule: placeholders, dates and visits
    for names, one patient under two spellings, as many patients as scans."""
    doubts: list[str] = []
    scans = Counter(patient for patient in whose.values() if patient)
    if taken := [patient for patient in scans if is_placeholder(patient)]:
        doubts.append(
            f"{examples(taken)} is what software writes in place of an id, and is taken for a patient."
        )
    if odd := [patient for patient in scans if kind_of(patient) in ("date", "visit", "uid", "contrast")]:
        doubts.append(
            f"{examples(odd)} reads like a date, a visit, a contrast or a UID; taken for a patient."
        )
    spelled: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(scans):
        spelled[alike(patient)].append(patient)
    if several := [names for names in spelled.values() if len(names) > 1]:
        pairs = "; ".join(" and ".join(map(shown, names[:SHOWN])) for names in several[:SHOWN])
        doubts.append(f"{len(several)} groups of names look like one patient each: {pairs}.")
    if len(scans) > 1 and max(scans.values()) == 1:
        doubts.append(f"Every scan is a patient of its own ({len(scans)}); is nobody here twice?")
    return doubts


def _by_subject(paths: list[tuple[str, ...]]) -> Reading:
    places = [next((i for i, part in enumerate(parts) if subject_of(part)), None) for parts in paths]
    names = [subject_of(parts[i]) if i is not None else "" for parts, i in zip(paths, places, strict=True)]
    above = [parts[:i] if i is not None else () for parts, i in zip(paths, places, strict=True)]
    patients, doubts = _under(above, names)
    whose = [Whose(patient, _visit(parts)) for patient, parts in zip(patients, paths, strict=True)]
    return Reading("a patient is the sub-… of the path (BIDS)", whose, doubts + _endings(names))


def _levels(paths: list[tuple[str, ...]]) -> list[int]:
    """Levels of folders, topmost first, with several values of which some may be persons."""
    found: list[int] = []
    for level in range(max(len(parts) for parts in paths) - 1):
        values = {parts[level] for parts in paths if len(parts) > level + 1}
        persons = _persons(values)
        if len(values) > 1 and persons and not (found and all(map(_SERIES.fullmatch, persons))):
            found.append(level)
    return found


def _six_digits(paths: list[tuple[str, ...]], level: int) -> bool:
    """Whether the folders of a level are all named by six digits that may be a date."""
    values = {parts[level] for parts in paths if len(parts) > level + 1}
    return all(re.fullmatch(r"\d{6}", value) for value in values) and all_short_dates(values)


def _persons(names: set[str]) -> set[str]:
    """Those folders of one level that may be persons: no date, visit…; or named like neighbours that are."""
    ids = {name for name in names if kind_of(name) == "id" and person_in(name)}
    shapes = {shape_of(name) for name in ids}
    others = {name for name in names - ids if kind_of(name) not in ("uid", "container")}
    return ids | {name for name in others if shape_of(name) in shapes}


def _by_folder(paths: list[tuple[str, ...]], level: int) -> Reading:
    values = {parts[level] for parts in paths if len(parts) > level + 1}
    persons = _persons(values)
    short = all_short_dates(values) and all(person_in(value, True) for value in persons)
    read = {v: (person_in(v, short) if kind_of(v) == "id" else v) if v in persons else "" for v in values}
    named, doubts = _without_runs(read)
    if loose := [parts for parts in paths if len(parts) <= level + 1 or _holds_many(parts[level], persons)]:
        return _mixed(paths, level, loose)
    own = [parts[level] if len(parts) > level + 1 else "" for parts in paths]
    patients, more = _under([parts[:level] for parts in paths], [named.get(name, "") for name in own])
    whose = [
        Whose(patient, _visit(parts, short, name, _end(read.get(name, ""), named.get(name, ""))))
        for patient, parts, name in zip(patients, paths, own, strict=True)
    ]
    doubts += more + _nested(paths, level, named)
    if cut := [value for value in values if read[value] and read[value] != value]:
        example = min(cut)
        doubts.append(f"Visits were cut off folders' names: {shown(example)} is {shown(read[example])}.")
    if odd := [value for value, name in named.items() if not name]:
        doubts.append(f"These folders are no patient's, and left out: {examples(odd)}.")
    where = "folder of the data root" if level == 0 else f"folder at depth {level + 1}"
    rule = f"a patient is a {where}, the topmost that varies and is no date, visit, contrast or group"
    return Reading(rule, whose, doubts)


def _holds_many(folder: str, persons: set[str]) -> bool:
    return folder not in persons and kind_of(folder) in ("container", "contrast", "group", "site")


def _mixed(paths: list[tuple[str, ...]], level: int, loose: list[tuple[str, ...]]) -> Reading:
    """Folders of patients beside files, or folders of files, that only their own names tell."""
    apart = set(loose)
    foldered, named = _by_folder([parts for parts in paths if parts not in apart], level), _by_name(loose)
    by_path = dict(zip(loose, named.whose, strict=True))
    rest = iter(foldered.whose)
    whose = [by_path[parts] if parts in apart else next(rest) for parts in paths]
    doubt = (
        f"Not in a patient's folder, and told by their names: {examples('/'.join(parts) for parts in loose)}."
    )
    return Reading(f"{foldered.rule}; else {named.rule}", whose, [doubt, *foldered.doubts, *named.doubts])


def _by_name(paths: list[tuple[str, ...]]) -> Reading:
    stems = {parts[-1] for parts in paths}
    channels = channels_of(stems)
    short = all_short_dates(stems) and all(person_in(channels.get(s, (s,))[0], True) for s in stems)
    read = {stem: person_in(channels.get(stem, (stem,))[0], short) for stem in stems}
    named, doubts = _without_runs(read)
    if not any(named.values()) or (len(stems) == 1 and len(paths) > 1):
        one = _constant_folder(paths)
        rule = "a patient is the one folder that all scans lie in" if one else "nothing says whose they are"
        return Reading(rule, [Whose(one, _visit(parts, short)) for parts in paths], [_ONE] if one else [])
    patients, more = _under([parts[:-1] for parts in paths], [named[parts[-1]] for parts in paths])
    whose = [
        Whose(patient, _visit(parts, short, end=_end(read[parts[-1]], named[parts[-1]])))
        for patient, parts in zip(patients, paths, strict=True)
    ]
    doubts += more
    if nameless := [stem for stem, name in named.items() if not name]:
        doubts.append(f"Nothing in these names says whose they are; left out: {examples(nameless)}.")
    if len(set(patients) - {""}) == 1 and len(stems) > 1:
        doubts.append(_ONE)
    return Reading("a patient is a file's name without channel, date, visit and contrast", whose, doubts)


def _end(read: str, kept: str) -> str:
    return read[len(kept) :].strip("-_. ") if read.startswith(kept) else ""


def _constant_folder(paths: list[tuple[str, ...]]) -> str:
    """The person that the one folder of all scans is called for, if it may be: first one with a digit."""
    levels = [{parts[level] for parts in paths} for level in range(min(map(len, paths)) - 1)]
    ids = [name for names in levels if len(names) == 1 for name in names if kind_of(name) == "id"]
    persons = [person for name in ids if (person := person_in(name))]
    return next((name for name in persons if re.search(r"\d", name)), (persons or [""])[0])


def _without_runs(named: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Names without the number or year behind an id (P001_1 and P001_2 are P001), where there are no more
    such numbers than ids: the reading that never takes one person for two."""
    kept, doubts = dict(named), []
    for most_digits in (3, 1):  # 100307_2_0: two numbers, the inner one of one digit
        cut = _runs({name for name in kept.values() if name}, most_digits)
        if not cut:
            break
        kept = {value: cut.get(name, name) for value, name in kept.items()}
        example = min(cut)
        doubts = [
            f"A number behind an id is taken for a scan's: {shown(example)} is patient {shown(cut[example])}."
            " If it is part of the id, set patient_pattern."
        ]
    return kept, doubts + _endings(kept.values())


def _runs(names: set[str], most_digits: int) -> dict[str, str]:
    years = {name: name.rpartition("_")[0] for name in names if YEAR.fullmatch(name.rpartition("_")[2])}
    if years and len(years) == len(names) and all(years.values()):
        return years
    ends = {n: match for n in names if (match := _RUN.fullmatch(n)) and len(match[2]) <= most_digits}
    ids, numbers = {match[1] for match in ends.values()}, {match[2] for match in ends.values()}
    return {name: match[1] for name, match in ends.items()} if 2 <= len(ids) >= len(numbers) else {}


def _endings(names: Iterable[str]) -> list[str]:
    """Ids of several beginnings that differ only behind it: P1_a, P1_b and P2_a. Where all begin alike
    (CASE_001, CASE_002), the end is the id."""
    words = {name: re.split(r"[-_. ]", name) for name in set(names)}
    for depth in range(1, max(map(len, words.values()), default=0)):
        by_start: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, own in words.items():
            by_start[tuple(own[:depth])].append(name)
        several = [sorted(group) for group in by_start.values() if len(group) > 1]
        if several and len(by_start) > 1:
            pair = " and ".join(map(shown, min(several)[:2]))
            return [
                f"{len(several)} groups of names differ only at the end ({pair}): one patient, or several?"
            ]
    return []


def _under(above: Sequence[Sequence[str]], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ids with the site they lie below, where there are several sites: each site gives its own ids. Below two
    visits or groups, an id is one person's."""
    sites = ["/".join(folder for folder in folders if kind_of(folder) == "site") for folders in above]
    doubts = []
    if len(set(sites)) > 1:
        known = {site for site in sites if site}
        doubts.append(f"Ids are taken for those of the sites that they lie below: {examples(known)}.")
        names = [f"{site}/{name}" if site and name else name for site, name in zip(sites, names, strict=True)]
    groups: dict[str, set[str]] = defaultdict(set)
    for folders, name in zip(above, names, strict=True):
        groups[name].add("/".join(f for f in folders if kind_of(f) in ("group", "id")))
    if shared := [name for name, where in groups.items() if name and len(where) > 1]:
        doubts.append(f"One id lies below several groups, and is taken for one patient: {examples(shared)}.")
    return list(names), doubts


def _nested(paths: list[tuple[str, ...]], level: int, named: Mapping[str, str]) -> list[str]:
    """Whether what lies below a patient's folder could be patients: Guys/IXI002 and Guys/IXI012."""
    children: dict[str, set[str]] = defaultdict(set)
    for parts in paths:
        if len(parts) > level + 1:
            own = named[parts[level]]
            below = [part for part in parts[level + 1 : -1] if kind_of(part) in _NESTED]
            below += [parts[-1]] if own and not _names(parts[-1], own) else []
            if persons := [name for part in below if (name := _person_below(part))]:
                children[parts[level]].add(persons[0])
    several = [(parent, sorted(names)) for parent, names in children.items() if len(names) > 1]
    if not several:
        return []
    parent, names = min(several)
    return [
        f"Below {shown(parent)} lie {examples(names)}: studies of one patient, or patients? They are taken "
        "for studies; if they are patients, set patient_pattern."
    ]


def _names(text: str, own: str) -> bool:
    """Whether a whole name stands within a longer one."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(own)}(?![A-Za-z0-9])", text) is not None


def _person_below(part: str) -> str:
    name = person_in(part)
    return "" if _SERIES.fullmatch(name) or contrast_of(name) else name


def _visit(parts: Sequence[str], short_dates: bool = False, patients_folder: str = "", end: str = "") -> str:
    """Dates and visits of a path and what was cut off its id; where there are none, the folders below the
    patient's."""
    visit_words = dict.fromkeys(
        word for part in parts for word in visit_in(part, short_dates).split(" ") if word
    )
    visit_words |= dict.fromkeys([end] if end else [])
    if visit_words or not patients_folder:
        return " ".join(visit_words)
    below = parts[list(parts).index(patients_folder) + 1 : -1]
    return "/".join(part for part in below if kind_of(part) in _NESTED)
