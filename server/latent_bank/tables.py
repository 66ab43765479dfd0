"""The file of the latent bank: which items it has from whom, their sealed records, what learned from them.

SQLite, one file. An item is a row; its sealed record is a row of another table under the same number, so that
looking through items reads none. Its origin (plan, policy, site, round, encoder) is a row that many share. An
item that was withdrawn leaves a tombstone: its name and nothing else, so that it is not taken again. Whoever
writes holds `writing()`: all of it is on the disk at the end, or none.

What is deleted is gone from the file: SQLite overwrites it with zeros (`secure_delete`). No write-ahead log
is kept, since it would hold on to every record that came; the rollback journal holds what was last deleted,
stays where it is instead of being unlinked with its content, and is overwritten by `wipe`. On a disk that
writes elsewhere (SSD, copy on write) old bytes may survive below the file system: they are encrypted, and
removing the key removes all of them. The file is never mapped into memory: a disk that fails is an error
then, and not the end of the process.

What this file does not do: seal (`records.py`) or decide what is taken (`bank.py`).
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

State = Literal["kept", "duplicate", "quarantined"]
STATES: tuple[State, ...] = ("kept", "duplicate", "quarantined")
_AT_ONCE = 500
_WIPED_AT_ONCE = 2**20
_UNWIPED = "unwiped"
_SETTINGS = (
    "page_size=16384",  # of a new file; a record of 216 KiB is read in 61 us, and in 91 from pages of 4096
    "journal_mode=PERSIST",
    "synchronous=FULL",
    "secure_delete=ON",
    "temp_store=MEMORY",  # nothing lies in a temporary file either
    "foreign_keys=ON",
)
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS origins (
    origin INTEGER PRIMARY KEY, plan TEXT NOT NULL, policy TEXT NOT NULL, site TEXT NOT NULL,
    participant INTEGER NOT NULL, round INTEGER NOT NULL, encoder TEXT NOT NULL, total INTEGER NOT NULL,
    next INTEGER NOT NULL, UNIQUE (plan, site, round));
CREATE TABLE IF NOT EXISTS items (
    number INTEGER PRIMARY KEY AUTOINCREMENT, origin INTEGER NOT NULL REFERENCES origins,
    name TEXT NOT NULL UNIQUE, position INTEGER NOT NULL, sha256 TEXT NOT NULL, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_place ON items (origin, state, position);
CREATE INDEX IF NOT EXISTS by_content ON items (sha256);
CREATE TABLE IF NOT EXISTS tombstones (name TEXT PRIMARY KEY, site TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS withdrawn_sites (site TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (
    path TEXT PRIMARY KEY, sha256 TEXT NOT NULL, last_round INTEGER NOT NULL, up_to INTEGER NOT NULL,
    items INTEGER NOT NULL, withdrawn INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Origin:
    """Where items come from."""

    origin: int
    """Number of the row."""
    plan: str
    """Hash of the plan under which they were released."""
    policy: str
    """As what they were released."""
    site: str
    """Who released them."""
    participant: int
    """Place of the site among the plan's participants."""
    round: int
    """During which round."""
    encoder: str
    """Hash of the encoder that made their codes; empty: they have none."""
    total: int
    """How many the site said it releases in that round."""
    next: int
    """How many of them were dealt with."""


@dataclass(frozen=True)
class Item:
    """One row."""

    number: int
    """Number that is never given again; ascending."""
    origin: int
    """Row of its origin."""
    name: str
    """Opaque name, 32 hex digits."""
    position: int
    """Place among what its site released in its round."""
    sha256: str
    """Hash of the latents as stored."""
    state: State
    """`duplicate`: another item has the same latents, and this one no record. `quarantined`: its record was
    damaged."""

    def header(self, origin: Origin) -> bytes:
        """What the record is sealed with: under another name, site, round or policy it does not open."""
        sealed = (
            origin.site,
            self.name,
            origin.round,
            self.position,
            origin.policy,
            origin.plan,
            self.sha256,
        )
        return "\0".join(map(str, sealed)).encode()


_ORIGIN = ", ".join(column.name for column in fields(Origin))
_ITEM = ", ".join(column.name for column in fields(Item))


class Tables:
    """The file; made when there is none, readable by its owner only. May be used by several threads.

    Whatever the file or its disk refuses is a `ValueError` of one line.
    """

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._path = path
        self._lock = threading.RLock()
        self._database = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
        try:
            for setting in _SETTINGS:
                self._database.execute(f"PRAGMA {setting}")
            self._database.executescript(_TABLES)
        except sqlite3.Error as error:
            self._database.close()
            raise self._failed(error) from error
        if self.meta(_UNWIPED):  # a deletion was cut off before its end
            self.wipe()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Everything written inside is on the disk at the end, or nothing of it; nobody else writes."""
        with self._lock:
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite has rolled back by itself when the disk is full
                    self._run("ROLLBACK")
                raise

    @contextmanager
    def deleting(self) -> Iterator[None]:
        """As `writing`, and at the end no byte of what was deleted is left in a file of the bank; should this
        be cut off, it is done when the bank is opened next."""
        with self.writing():
            self.set_meta(_UNWIPED, "true")
            yield
        self.wipe()

    def wipe(self) -> None:
        """Overwrite the rollback journal, which holds what was deleted last."""
        journal = self._path.with_name(self._path.name + "-journal")
        with self.writing():  # as long as this begins nothing, no journal is in use
            try:
                handle = os.open(journal, os.O_RDWR)
            except FileNotFoundError:
                pass
            else:
                with os.fdopen(handle, "r+b") as file:
                    left = os.fstat(handle).st_size
                    while left:
                        left -= file.write(bytes(min(left, _WIPED_AT_ONCE)))
                    file.flush()
                    os.fsync(handle)
                    file.truncate(0)
        with self.writing():
            self._run("DELETE FROM meta WHERE name = ?", _UNWIPED)

    def meta(self, name: str) -> str | None:
        """A fact about the whole bank."""
        row = self._one("SELECT value FROM meta WHERE name = ?", name)
        return None if row is None else str(row[0])

    def set_meta(self, name: str, value: str) -> None:
        """Note a fact about the whole bank."""
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", name, value)

    def origins(self) -> dict[int, Origin]:
        """All origins by row, in the order of training: by round, then place of the site, then plan."""
        rows = self._all(f"SELECT {_ORIGIN} FROM origins ORDER BY round, participant, plan")
        return {row[0]: Origin(*row) for row in rows}

    def origin(self, item: Item) -> Origin:
        """Where an item comes from."""
        return Origin(*self._one(f"SELECT {_ORIGIN} FROM origins WHERE origin = ?", item.origin))

    def origin_of(self, plan: str, site: str, round_number: int) -> Origin | None:
        """The origin of what a site releases in a round, once it has answered."""
        where = "WHERE plan = ? AND site = ? AND round = ?"
        row = self._one(f"SELECT {_ORIGIN} FROM origins {where}", plan, site, round_number)
        return None if row is None else Origin(*row)

    def begin(self, origin: Origin) -> Origin:
        """Note a new origin; its row is given here."""
        values = [getattr(origin, name) for name in _ORIGIN.split(", ")]
        self._run("INSERT INTO origins VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", *values[1:])
        return replace(origin, origin=self._one("SELECT last_insert_rowid()")[0])

    def dealt_with(self, origin: Origin, up_to: int) -> None:
        """Note that an origin's items below `up_to` were taken or refused."""
        self._run("UPDATE origins SET next = MAX(next, ?) WHERE origin = ?", up_to, origin.origin)

    def insert(self, item: Item, sealed: bytes | None = None) -> None:
        """Note an item, and its record if it is kept; its number is given here, whatever it says."""
        values = [getattr(item, name) for name in _ITEM.split(", ")]
        self._run("INSERT INTO items VALUES (NULL, ?, ?, ?, ?, ?)", *values[1:])
        if sealed is not None:
            self._run("INSERT INTO records VALUES (last_insert_rowid(), ?)", sealed)

    def sealed(self, items: Sequence[Item]) -> dict[int, bytes]:
        """Records by the numbers of these items; without those that the file does not give."""
        marks = ",".join("?" * len(items))
        statement = f"SELECT number, sealed FROM records WHERE number IN ({marks})"
        try:
            with self._lock:
                rows = self._database.execute(statement, [item.number for item in items]).fetchall()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise self._failed(error) from error
            half = len(items) // 2  # the file is damaged where one of them lies
            return self.sealed(items[:half]) | self.sealed(items[half:]) if half else {}
        return {number: sealed for number, sealed in rows if isinstance(sealed, bytes)}

    def item(self, name: str) -> Item | None:
        """The item of this name."""
        return next(iter(self._items("name = ?", name)), None)

    def of_content(self, sha256: str, state: State) -> list[Item]:
        """Items in a state that have these latents."""
        return self._items("sha256 = ? AND state = ?", sha256, state)

    def numbers(self, origin: int, state: State) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Numbers of an origin's items in a state, by position."""
        rows = self._all(
            "SELECT number FROM items WHERE origin = ? AND state = ? ORDER BY position", origin, state
        )
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def numbered(self, numbers: Sequence[int]) -> dict[int, Item]:
        """Those of these items that are still there."""
        found: dict[int, Item] = {}
        for first in range(0, len(numbers), _AT_ONCE):
            some = numbers[first : first + _AT_ONCE]
            marks = ",".join("?" * len(some))
            found |= {item.number: item for item in self._items(f"number IN ({marks})", *some)}
        return found

    def count(self, state: State, site: str | None = None) -> int:
        """Items in a state, of a site or of all."""
        of_site = "JOIN origins USING (origin) WHERE site = ? AND" if site is not None else "WHERE"
        values = (state,) if site is None else (site, state)
        return int(self._one(f"SELECT COUNT(*) FROM items {of_site} state = ?", *values)[0])

    def last_number(self) -> int:
        """Number of the youngest item there ever was."""
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = 'items'")
        return 0 if row is None else int(row[0])

    def set_state(self, item: Item, state: State) -> None:
        """Note what became of an item."""
        self._run("UPDATE items SET state = ? WHERE number = ?", state, item.number)

    def remove(self, item: Item) -> None:
        """Remove an item and its record."""
        # One row at a time: a statement that deletes many may keep their pages in a journal of its own.
        self._run("DELETE FROM records WHERE number = ?", item.number)
        self._run("DELETE FROM items WHERE number = ?", item.number)

    def bury(self, item: Item, site: str) -> None:
        """Remove an item and leave its tombstone."""
        self.remove(item)
        self._run("INSERT OR IGNORE INTO tombstones VALUES (?, ?)", item.name, site)

    def is_buried(self, name: str) -> bool:
        """Whether an item was withdrawn."""
        return self._one("SELECT 1 FROM tombstones WHERE name = ?", name) is not None

    def num_buried(self, site: str | None = None) -> int:
        """Items that were withdrawn, of a site or of all."""
        return int(self._one("SELECT COUNT(*) FROM tombstones WHERE site = IFNULL(?, site)", site)[0])

    def withdraw_site(self, site: str) -> None:
        """Note that nothing of this site is taken any more."""
        self._run("INSERT OR IGNORE INTO withdrawn_sites VALUES (?)", site)

    def withdrawn_sites(self) -> set[str]:
        """Sites of which nothing is taken any more."""
        return {str(row[0]) for row in self._all("SELECT site FROM withdrawn_sites")}

    def learned(self, path: str, sha256: str, last_round: int, items: int) -> None:
        """Note that the model at `path` learned from all items there are up to a round.

        Withdrawals that were noted for this path stay: the file may be the same model, trained on.
        """
        self._run(
            "INSERT INTO models VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT (path) DO UPDATE SET "
            "sha256 = excluded.sha256, last_round = excluded.last_round, up_to = excluded.up_to, "
            "items = excluded.items",
            path, sha256, last_round, self.last_number(), items,
        )  # fmt: skip

    def mark_models(self, item: Item, round_number: int) -> list[str]:
        """Count a withdrawn item at every model that learned from it; their paths."""
        where = "WHERE up_to >= ? AND last_round >= ?"
        self._run(f"UPDATE models SET withdrawn = withdrawn + 1 {where}", item.number, round_number)
        return [
            str(row[0]) for row in self._all(f"SELECT path FROM models {where}", item.number, round_number)
        ]

    def models(self) -> list[tuple[str, str, int, int, int]]:
        """Path, hash, last round, items, and items withdrawn since, of every model."""
        return self._all("SELECT path, sha256, last_round, items, withdrawn FROM models ORDER BY path")

    def _items(self, where: str, *values: Any) -> list[Item]:
        return [Item(*row) for row in self._all(f"SELECT {_ITEM} FROM items WHERE {where}", *values)]

    def _run(self, statement: str, *values: Any) -> None:
        self._all(statement, *values)

    def _one(self, statement: str, *values: Any) -> Any:
        return next(iter(self._all(statement, *values)), None)

    def _all(self, statement: str, *values: Any) -> list[Any]:
        try:
            with self._lock:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> ValueError:
        return ValueError(f"Expected the file of a latent bank at {self._path} that can be used; {error}.")
