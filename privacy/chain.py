"""An append-only file in which every line vouches for the one before: the ledger and the journal.

One JSON object per line: index, UTC time, hash of the line before, the record, and the hash of all of that.
Editing, removing or reordering a line breaks the chain at that line. A crash while writing leaves a torn last
line, which was never an entry: opening the file drops it and adds a line that says so.

Does not do: secrecy (records are plain text), or proof against whoever can rewrite the whole file or cut
whole lines off its end; for the latter, compare `head` with a copy kept elsewhere (the journal holds the
ledger's).
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forms.json_text import canonical, read_json, sha256_of


class BrokenChain(ValueError):
    """A line was edited, removed, moved or cut; the message names the file and the line."""


@dataclass(frozen=True)
class Entry:
    """One line of a chain."""

    index: int
    """Position in the file, from 0."""
    utc: str
    """When it was written, ISO 8601."""
    previous: str
    """Hash of the line before; of the chain's purpose for the first line."""
    record: dict[str, Any]
    """What was recorded."""
    sha256: str
    """Hash of everything above."""


class Chain:
    """A hash-chained JSONL file, opened for appending; the folder is created if need be.

    Opening verifies the whole file. `purpose` enters the first hash: a journal cannot pass for a ledger.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self.path = path
        self._genesis = _genesis(purpose)
        self._head = self._genesis
        self._count = 0
        self._stamp = (-1, -1)  # size and time of the file when last read; -1: not read yet
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as descriptor:
            self._catch_up(descriptor)

    @property
    def head(self) -> str:
        """Hash of the last line known to this object."""
        return self._head

    def append(self, record: Mapping[str, Any]) -> str:
        """Write one record and return the hash of its line. On the disk when this returns (fsync).

        Raises `BrokenChain` if the file was tampered with since it was last read: a broken chain is not
        extended.
        """
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            return self._write(descriptor, dict(record))

    def extend(self, decide: Callable[[Sequence[Entry]], Mapping[str, Any] | None]) -> str | None:
        """Show `decide` all lines and write the record that it gives, with no other writer in between.

        The hash of the new line; None where it gave none. Raises what `decide` and `append` raise.
        """
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            record = decide(_parse(_read(descriptor), self.path, self._genesis))
            return None if record is None else self._write(descriptor, dict(record))

    def entries(self) -> list[Entry]:
        """All lines, in order, verified; raises `BrokenChain` naming the line."""
        with self._locked() as descriptor:
            content = _read(descriptor)
        return _parse(content, self.path, self._genesis)

    def verify(self, head: str | None = None) -> int:
        """Check every line and return their number; with `head`, also that the chain still holds that line.

        Raises `BrokenChain` naming the first bad line.
        """
        entries = self.entries()
        if head is not None:
            held(self.path, entries, head)
        return len(entries)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # One writer at a time, across processes: a half-written line must never look torn to a neighbour.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _catch_up(self, descriptor: int) -> None:
        if _stamp(descriptor) == self._stamp:
            return
        content = _read(descriptor)
        whole = content[: content.rfind(b"\n") + 1]
        entries = _parse(whole, self.path, self._genesis)
        self._count = len(entries)
        self._head = entries[-1].sha256 if entries else self._genesis
        self._stamp = _stamp(descriptor)
        if dropped := len(content) - len(whole):
            os.ftruncate(descriptor, len(whole))
            self._write(descriptor, {"kind": "repair", "note": "torn last line dropped", "bytes": dropped})

    def _write(self, descriptor: int, record: dict[str, Any]) -> str:
        body = {
            "index": self._count,
            "utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "previous": self._head,
            "record": record,
        }
        sha256 = sha256_of(canonical(body))
        line = (canonical({**body, "sha256": sha256}) + "\n").encode()
        written = os.write(descriptor, line)
        if written != len(line):  # a full disk: leave a torn line, which the next opening repairs
            raise OSError(
                f"{self.path}: expected to write {len(line)} bytes, wrote {written}; is the disk full?"
            )
        os.fsync(descriptor)
        self._head, self._count, self._stamp = sha256, self._count + 1, _stamp(descriptor)
        return sha256


def read_chain(path: Path, purpose: str) -> list[Entry]:
    """All lines of the chain at `path`, verified; nothing is written, and a torn last line is not repaired.

    Raises `BrokenChain` naming the line, and `ValueError` when there is no such file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"Expected a {purpose} at {path}; {error.strerror}.") from None
    return _parse(content, path, _genesis(purpose))


def held(path: Path, entries: Sequence[Entry], head: str) -> None:
    """Raise `BrokenChain` unless the line with hash `head` is among the `entries` of the file `path`."""
    if head not in {entry.sha256 for entry in entries}:
        raise BrokenChain(
            f"{path}: expected a line with hash {head[:12]}…, found none in {len(entries)} lines; "
            "lines were cut off the end or the file was rewritten."
        )


def _genesis(purpose: str) -> str:
    return hashlib.sha256(f"fedmeduet {purpose}".encode()).hexdigest()


def _parse(content: bytes, path: Path, genesis: str) -> list[Entry]:
    entries: list[Entry] = []
    previous = genesis
    lines = content.split(b"\n")
    if lines.pop():
        raise _broken(path, len(lines), "is cut off")
    for index, line in enumerate(lines):
        entry = _entry(line)
        if entry is None:
            raise _broken(path, index, "is not an entry or was edited")
        if entry.previous != previous or entry.index != index:
            raise _broken(path, index, f"does not follow line {index}; lines were removed or moved")
        entries.append(entry)
        previous = entry.sha256
    return entries


def _broken(path: Path, index: int, what: str) -> BrokenChain:
    return BrokenChain(f"{path}: line {index + 1} {what}. Keep it as evidence and restore a backup.")


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _entry(line: bytes) -> Entry | None:
    """The entry on a line; None when it is not JSON, has other fields or kinds of value, or another hash."""
    try:
        fields = read_json(line, "an entry")
    except ValueError:
        return None
    kinds = {"index": int, "utc": str, "previous": str, "record": dict, "sha256": str}
    if not isinstance(fields, dict) or set(fields) != set(kinds):
        return None
    if not all(isinstance(fields[name], kind) for name, kind in kinds.items()):
        return None
    body = {name: fields[name] for name in ("index", "utc", "previous", "record")}
    try:
        expected = (canonical({**body, "sha256": fields["sha256"]})).encode()
    except ValueError:
        return None
    # The bytes themselves must be canonical: the same JSON with other spaces is an edit, too.
    if line != expected or sha256_of(canonical(body)) != fields["sha256"]:
        return None
    return Entry(**fields)
