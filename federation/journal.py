"""The journal: what crossed the wall, line by line, in a file that shows tampering; and reading one.

A site writes one line per release (kind, bytes, hash of what left, norms, plan, round), the server one line
per event of a run. The chain itself is `privacy/chain.py`. Reading writes nothing: a torn last line is named,
not repaired.

Does not do: hold the released values, or anything about a patient; say who changed a journal.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from privacy.chain import BrokenChain, Chain, Entry, held, read_chain

__all__ = ["BrokenChain", "Journal", "journal_lines", "journal_verdict", "read_journal"]

PURPOSE = "journal"
_FIRST = ("to", "site", "name", "plan", "round", "tensors", "bytes", "norm", "norm_after", "bound", "sha256")
_LONG = frozenset({"kind", "promise", "noise", "metrics", "loss", "ledger"})
"""Left out of a line of `journal_lines`, or said first; `full` shows them."""
_HASH = re.compile(r"[0-9a-f]{64}")


class Journal(Chain):
    """A hash-chained record of what left (at a site) or happened (at the server).

    `append(record)` returns the hash of the new line, `verify()` the number of lines; both raise
    `BrokenChain` naming the line when the file was edited, shortened inside, or reordered.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, purpose=PURPOSE)


def read_journal(path: Path, head: str = "") -> list[Entry]:
    """The verified lines of the journal at `path`; with `head`, also that the line of this hash is still
    there.

    Raises `BrokenChain` naming the line that was edited, moved, removed or cut, and `ValueError` when there
    is no journal.
    """
    entries = read_chain(path, PURPOSE)
    if head:
        held(path, entries, head)
    return entries


def journal_lines(entries: list[Entry], full: bool = False) -> Iterator[str]:
    """The journal for people: number, time, kind, then the fields that matter; `full`: every field as
    JSON."""
    for entry in entries:
        when = entry.utc[:19].replace("T", " ")
        kind = str(entry.record.get("kind", "?"))
        if full:
            yield f"{entry.index + 1:>5}  {when}  {json.dumps(entry.record, sort_keys=True)}"
            continue
        rest = [name for name in entry.record if name not in _FIRST and name not in _LONG]
        names = [name for name in _FIRST if name in entry.record] + sorted(rest)
        fields = " ".join(f"{name}={_short(entry.record[name])}" for name in names)
        yield f"{entry.index + 1:>5}  {when}  {kind:<11} {fields}"


def journal_verdict(path: Path, entries: list[Entry], head: str) -> list[str]:
    """What to say of a journal that was found whole."""
    last = entries[-1].sha256 if entries else "none"
    lines = [f"{path}: {len(entries)} lines, each as it was written and in its place."]
    if head:
        lines.append(f"The line with hash {head[:12]}… is there: nothing was cut off before it.")
    else:
        lines.append("Whether lines were cut off the end shows only against a hash kept elsewhere (--head).")
    return [*lines, f"Hash of the last line, to be kept elsewhere: {last}"]


def _short(value: Any) -> str:
    if isinstance(value, str):
        return f"{value[:12]}…" if _HASH.fullmatch(value) else value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(map(_short, value)) or "none"
    if isinstance(value, dict):
        return ",".join(f"{name}:{_short(inner)}" for name, inner in value.items()) or "none"
    return str(value)
