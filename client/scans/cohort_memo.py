"""The cohort memo: a cohort that was opened before is not read again while no file has changed.

Opening a cohort reads every scan, and a site is opened for every message. The memo keeps the cohort, with
the identity (inode, size, times of change) of every file below the data root and of every file the cohort
names, and it holds only while all of these, the site's settings and this package's code are the same. Any
change: the whole cohort is opened again. It names patients and paths, and stays in the site's folder.

Does not do: remember part of a cohort; decide anything (`client/scans/cohort.py`).
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import scans
from client.scans.cohort import Cohort, Exclusion, ScanEntry
from client.scans.fingerprints import SETTLED_S
from client.scans.patients import PatientMap
from client.scans.tables import Join
from scans.scans import Note, Reason
from storage.files import write_whole

_CODE = (Path(__file__).parent, Path(scans.__file__).parent)


def remembered(memo: Path, root: Path, settings: Mapping[str, Any], open_it: Callable[[], Cohort]) -> Cohort:
    """The cohort in the file `memo` if it still holds, else that of `open_it`, which is then remembered.

    `settings`: every value, JSON, that decides about the cohort besides the files below `root` (a folder, or
    a manifest). A damaged memo is forgotten. Files younger than two seconds are not remembered: they could
    change again within the clock's grain.
    """
    before, newest_s = _digest([code_sha256(), json.dumps(settings, sort_keys=True)], _below(root))
    kept = _load(memo)
    if kept is not None and kept[0] == before and kept[1] == _named(kept[2])[0]:
        return kept[2]
    cohort = open_it()
    named, newest_named_s = _named(cohort)
    if time.time() - max(newest_s, newest_named_s) > SETTLED_S:
        content = {"below": before, "named": named, "cohort": dataclasses.asdict(cohort)}
        write_whole(memo, json.dumps(content, default=str).encode())
    return cohort


def _below(root: Path) -> Iterable[Path]:
    folder = root if root.is_dir() else root.parent
    for place, folders, names in os.walk(folder, onerror=lambda error: None):
        folders.sort()
        yield from (Path(place, name) for name in (*folders, *sorted(names)))


def _named(cohort: Cohort) -> tuple[str, float]:
    of_scans = (
        path for scan in cohort.scans for path in (*scan.files, *filter(None, [scan.label_path]))
    )  # a manifest may name files that lie elsewhere
    others = (path for exclusion in cohort.exclusions for path in exclusion.all_files)
    return _digest([], (path for paths in (of_scans, others) for path in paths))


def _digest(texts: Iterable[str], paths: Iterable[Path]) -> tuple[str, float]:
    """Hash of the texts and of the files' identities, and when the youngest file changed (seconds)."""
    digest, newest_ns = hashlib.sha256(), 0
    for text in texts:
        digest.update(_line(text))
    for path in paths:
        try:
            status = path.stat()
            identity = f"{status.st_mode}"
            if path.is_dir():
                digest.update(_line(f"{path}:folder:{identity}:{path.is_symlink()}"))
                continue
            newest_ns = max(newest_ns, status.st_mtime_ns, status.st_ctime_ns)
            identity += f":{status.st_dev}:{status.st_ino}:{status.st_size}"
            identity += f":{status.st_mtime_ns}:{status.st_ctime_ns}"
        except OSError as error:
            identity = f"errno {error.errno}"
        digest.update(_line(f"{path}:{identity}"))
    return digest.hexdigest(), newest_ns / 1e9


def _line(text: str) -> bytes:
    return f"{text}\n".encode("utf-8", "surrogateescape")  # names may be in any encoding


def code_sha256() -> str:
    """Hash of this package's source: another version may decide otherwise."""
    digest = hashlib.sha256()
    for path in (path for folder in _CODE for path in sorted(folder.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _load(memo: Path) -> tuple[str, str, Cohort] | None:
    try:
        content = json.loads(memo.read_bytes())
        fields = content["cohort"]
        cohort = Cohort(
            Path(fields["root"]),
            tuple(_entry(values) for values in fields["scans"]),
            tuple(_exclusion(values) for values in fields["exclusions"]),
            PatientMap(**{**fields["patient_map"], "doubts": tuple(fields["patient_map"]["doubts"])}),
            tuple(Join(**{**values, "table": Path(values["table"])}) for values in fields["joins"]),
            tuple(fields["notes"]),
        )
        return str(content["below"]), str(content["named"]), cohort
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _entry(values: dict[str, Any]) -> ScanEntry:
    label = values["label_path"]
    paths = {
        "path": Path(values["path"]),
        "files": tuple(map(Path, values["files"])),
        "label_path": None if label is None else Path(label),
        "notes": tuple(map(Note, values["notes"])),
    }
    return ScanEntry(**{**values, **paths})


def _exclusion(values: dict[str, Any]) -> Exclusion:
    paths = {"path": Path(values["path"]), "files": tuple(map(Path, values["files"]))}
    return Exclusion(**{**values, **paths, "reason": Reason(values["reason"])})
