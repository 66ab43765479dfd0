"""Marks of withdrawal: files beside which it is written that somebody withdrew what they were made of.

`withdrawn.json` in a file's folder names files, their hashes, and who withdrew. A mark is of these bytes:
another file under the same name is not marked. Whoever loads a marked file is told, by a warning in the log.

Does not do: decide who withdrew (`server/releases.py`), or follow copies into other folders.
"""

import json
import logging
from pathlib import Path
from typing import Any

from forms.json_text import read_json
from meduet_models.weights import sha256_of_file
from storage.files import write_whole

MARKS = "withdrawn.json"
_log = logging.getLogger(__name__)


def mark(path: Path, site: str) -> None:
    """Write down that `site` withdrew what the file at `path` was made of."""
    marks = _read(path.parent)
    sha256 = sha256_of_file(path)
    known = marks.get(path.name, {})
    sites = set(known["sites"]) if known.get("sha256") == sha256 else set()
    marks[path.name] = {"sha256": sha256, "sites": sorted(sites | {site})}
    write_whole(path.parent / MARKS, (json.dumps(marks, indent=1, sort_keys=True) + "\n").encode())


def marked(path: Path) -> tuple[str, ...]:
    """Who withdrew what the file at `path` was made of; raises `ValueError` when the marks are damaged."""
    known = _read(path.parent).get(path.name)
    if known is None or known.get("sha256") != sha256_of_file(path):
        return ()
    return tuple(known["sites"])


def warn_if_withdrawn(path: Path) -> None:
    """Tell whoever loads the file at `path` that somebody withdrew what it was made of."""
    if sites := marked(path):
        _log.warning(
            "%s was made of releases that %d sites withdrew since. Ask the consortium before you use it.",
            path.name, len(sites),
        )  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MARKS
    if not path.is_file():
        return {}
    marks = read_json(path.read_text(encoding="utf-8"), f"the marks in {path}")
    good = isinstance(marks, dict) and all(
        isinstance(one, dict) and isinstance(one.get("sha256"), str) and isinstance(one.get("sites"), list)
        for one in marks.values()
    )
    if not good:
        raise ValueError(f"Expected {path} to hold marks of withdrawal; got something else.")
    return dict(marks)
