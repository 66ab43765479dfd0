"""The index of the latent bank: which items it has from whom, where they lie, which models learned from them.

SQLite, one file. An item is a row; its origin (plan, policy, site, round, encoder) is a row that many share.
An item that was withdrawn leaves a tombstone: its name and nothing else, so that it is not taken again.
Whoever writes holds `writing()`: all of it is on the disk at the end, or none. What this file does not do:
touch records (`latent_shards.py`) or decide what is taken (`latent_bank.py`).
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

State = Literal["kept", "duplicate", "quarantined"]
STATES: tuple[State, ...] = ("kept", "duplicate", "quarantined")
_AT_ONCE = 500
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS origins (
    origin INTEGER PRIMARY KEY, plan TEXT NOT NULL, policy TEXT NOT NULL, site TEXT NOT NULL,
    participant INTEGER NOT NULL, round INTEGER NOT NULL, encoder TEXT NOT NULL, total INTEGER NOT NULL,
    next INTEGER NOT NULL, UNIQUE (plan, site, round));
CREATE TABLE IF NOT EXISTS items (
    number INTEGER PRIMARY KEY AUTOINCREMENT, origin INTEGER NOT NULL REFERENCES origins, item BLOB NOT NULL,
    position INTEGER NOT NULL, sha256 BLOB NOT NULL, slot INTEGER, state TEXT NOT NULL, UNIQUE (item));
CREATE INDEX IF NOT EXISTS by_place ON items (origin, state, position);
CREATE INDEX IF NOT EXISTS by_content ON items (sha256);
CREATE TABLE IF NOT EXISTS tombstones (item BLOB PRIMARY KEY, site TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS withdrawn_sites (site TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (
    path TEXT PRIMARY KEY, sha256 TEXT NOT NULL, last_round INTEGER NOT NULL, up_to INTEGER NOT NULL,
    items INTEGER NOT NULL, withdrawn INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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
    slot: int | None
    """Where its record lies; None for a duplicate."""
    state: State
    """`duplicate`: another item has the same latents. `quarantined`: its record was damaged."""

    def header(self, origin: Origin) -> bytes:
        """What the record is sealed with: under another name, site, round or policy it does not open."""
        told = (origin.site, self.name, origin.round, self.position, origin.policy, origin.plan, self.sha256)
        return "\0".join(map(str, told)).encode()


class LatentIndex:
    """The index file; made when there is none, readable by its owner only. May be used by several threads."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = threading.RLock()
        self._database = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
        try:
            for setting in ("synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
                self._database.execute(f"PRAGMA {setting}")
            self._database.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"Expected the index of a latent bank at {path}; {error}.") from None

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Everything written inside is on the disk at the end, or nothing of it; nobody else writes."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def meta(self, name: str) -> str | None:
        """A fact about the whole bank."""
        row = self._one("SELECT value FROM meta WHERE name = ?", name)
        return None if row is None else str(row[0])

    def set_meta(self, name: str, value: str) -> None:
        """Note a fact about the whole bank."""
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", name, value)

    def origins(self) -> dict[int, Origin]:
        """All origins by row, in the order of training: by round, then place of the site, then plan."""
        rows = self._all(
            "SELECT origin, plan, policy, site, participant, round, encoder, total, next FROM origins "
            "ORDER BY round, participant, plan"
        )
        names = ("origin", "plan", "policy", "site", "participant", "round", "encoder", "total", "next")
        return {row[0]: Origin(**dict(zip(names, row, strict=True))) for row in rows}

    def origin_of(self, plan: str, site: str, round: int) -> Origin | None:
        """The origin of what a site releases in a round, once it has answered."""
        row = self._one("SELECT origin FROM origins WHERE plan=? AND site=? AND round=?", plan, site, round)
        return None if row is None else self.origins()[row[0]]

    def begin(self, origin: Origin) -> Origin:
        """Note a new origin; its row is given here."""
        values = (
            origin.plan, origin.policy, origin.site, origin.participant, origin.round, origin.encoder,
            origin.total, origin.next,
        )  # fmt: skip
        self._run(
            "INSERT INTO origins (plan, policy, site, participant, round, encoder, total, next) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *values,
        )
        found = self.origin_of(origin.plan, origin.site, origin.round)
        assert found is not None
        return found

    def dealt_with(self, origin: Origin, up_to: int) -> None:
        """Note that an origin's items below `up_to` were taken or refused."""
        self._run("UPDATE origins SET next = MAX(next, ?) WHERE origin = ?", up_to, origin.origin)

    def insert(self, item: Item) -> None:
        """Note an item; its number is given here, whatever it says."""
        self._run(
            "INSERT INTO items (origin, item, position, sha256, slot, state) VALUES (?, ?, ?, ?, ?, ?)",
            item.origin,
            bytes.fromhex(item.name),
            item.position,
            bytes.fromhex(item.sha256),
            item.slot,
            item.state,
        )

    def item(self, name: str) -> Item | None:
        """The item of this name."""
        return next(self._items("WHERE item = ?", bytes.fromhex(name)), None)

    def kept_twin(self, sha256: str) -> bool:
        """Whether an item with these latents is kept."""
        return self._one(
            "SELECT 1 FROM items WHERE sha256 = ? AND state = 'kept'", bytes.fromhex(sha256)
        ) is not None  # fmt: skip

    def twins(self, item: Item) -> list[Item]:
        """Duplicates of an item."""
        return list(self._items("WHERE sha256 = ? AND state = 'duplicate'", bytes.fromhex(item.sha256)))

    def numbers(self, origin: int, state: State) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Numbers of an origin's items in a state, by position."""
        with self._lock:
            rows = self._database.execute(
                "SELECT number FROM items WHERE origin = ? AND state = ? ORDER BY position", (origin, state)
            )
            return np.fromiter((row[0] for row in rows), np.int64)

    def numbered(self, numbers: Sequence[int]) -> dict[int, Item]:
        """Those of these items that are still there."""
        found: dict[int, Item] = {}
        for first in range(0, len(numbers), _AT_ONCE):
            some = numbers[first : first + _AT_ONCE]
            marks = ",".join("?" * len(some))
            found |= {item.number: item for item in self._items(f"WHERE number IN ({marks})", *some)}
        return found

    def count(self, state: State, site: str | None = None) -> int:
        """Items in a state, of a site or of all."""
        if site is None:
            row = self._one("SELECT COUNT(*) FROM items WHERE state = ?", state)
        else:
            row = self._one(
                "SELECT COUNT(*) FROM items JOIN origins USING (origin) WHERE state = ? AND site = ?",
                state,
                site,
            )
        assert row is not None
        return int(row[0])

    def last_number(self) -> int:
        """Number of the youngest item there ever was."""
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = 'items'")
        return 0 if row is None else int(row[0])

    def set_state(self, item: Item, state: State) -> None:
        """Note what became of an item."""
        self._run("UPDATE items SET state = ? WHERE number = ?", state, item.number)

    def remove(self, item: Item) -> None:
        """Remove an item that will be taken anew."""
        self._run("DELETE FROM items WHERE number = ?", item.number)

    def bury(self, item: Item, site: str) -> None:
        """Remove an item and leave its tombstone."""
        self.remove(item)
        self._run("INSERT OR IGNORE INTO tombstones VALUES (?, ?)", bytes.fromhex(item.name), site)

    def is_buried(self, name: str) -> bool:
        """Whether an item was withdrawn."""
        return self._one("SELECT 1 FROM tombstones WHERE item = ?", bytes.fromhex(name)) is not None

    def num_buried(self, site: str | None = None) -> int:
        """Items that were withdrawn, of a site or of all."""
        row = self._one("SELECT COUNT(*) FROM tombstones WHERE ? IN (site, '')", site or "")
        assert row is not None
        return int(row[0])

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

    def mark_models(self, item: Item, round: int) -> list[str]:
        """Count a withdrawn item at every model that learned from it; their paths."""
        where = "WHERE up_to >= ? AND last_round >= ?"
        self._run(f"UPDATE models SET withdrawn = withdrawn + 1 {where}", item.number, round)
        return [str(row[0]) for row in self._all(f"SELECT path FROM models {where}", item.number, round)]

    def models(self) -> list[tuple[str, str, int, int, int]]:
        """Path, hash, last round, items, and items withdrawn since, of every model."""
        return self._all("SELECT path, sha256, last_round, items, withdrawn FROM models ORDER BY path")

    def _items(self, where: str, *values: Any) -> Iterator[Item]:
        rows = self._all(
            f"SELECT number, origin, item, position, sha256, slot, state FROM items {where}", *values
        )
        for number, origin, item, position, sha256, slot, state in rows:
            yield Item(
                number=number,
                origin=origin,
                name=item.hex(),
                position=position,
                sha256=sha256.hex(),
                slot=slot,
                state=state,
            )

    def _run(self, statement: str, *values: Any) -> None:
        with self._lock:
            self._database.execute(statement, values)

    def _all(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    def _one(self, statement: str, *values: Any) -> Any:
        with self._lock:
            return self._database.execute(statement, values).fetchone()
