"""Turns: one answer at a time on a site's machine, in the order in which the questions came.

Plans of one centre come through one SuperNode, which hands over one question after the other; plans of two
centres come through two. What reads scans and trains waits here for its turn, so that no two answers share
memory, device and cores, and none is overtaken: it waits for what was asked before it, at most one answer of
each other SuperNode. A turn is a file that its process holds locked: who dies gives it back.

Does not do: stop an answer that takes long (`client/watchdog.py`; waiting counts as time of the question),
or order questions of one SuperNode, which the centre hands out oldest first.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.watchdog import DeadlineMissed, is_waited_for
from storage.files import OWNER, private_folder

TURNS = "turns"
"""The folder, in the site's state folder."""
_COUNTER = "lock"
_LOOK_S = 0.05


@contextmanager
def turn(state_dir: Path) -> Iterator[float]:
    """Wait until all that was asked before is answered; gives the seconds that took.

    Raises `DeadlineMissed` when nobody waits for this answer any more.
    """
    folder, began = private_folder(state_dir / TURNS), time.monotonic()
    number, ticket = _drawn(folder)
    try:
        while any(_is_held(path) for path in _before(folder, number)):
            if not is_waited_for():
                raise DeadlineMissed("Expected a turn in time; the answers before took too long.")
            time.sleep(_LOOK_S)
        yield time.monotonic() - began
    finally:
        _path(folder, number).unlink(missing_ok=True)
        os.close(ticket)


def _drawn(folder: Path) -> tuple[int, int]:
    """The next number, and its file, locked before anybody else can see it."""
    counter = os.open(folder / _COUNTER, os.O_RDWR | os.O_CREAT, OWNER)
    try:
        fcntl.flock(counter, fcntl.LOCK_EX)
        number = max((int(path.name) for path in folder.glob("[0-9]*")), default=0) + 1
        ticket = os.open(_path(folder, number), os.O_RDWR | os.O_CREAT, OWNER)
        fcntl.flock(ticket, fcntl.LOCK_EX)
        return number, ticket
    finally:
        os.close(counter)


def _before(folder: Path, number: int) -> list[Path]:
    return [path for path in folder.glob("[0-9]*") if int(path.name) < number]


def _is_held(path: Path) -> bool:
    """Whether whoever drew this number still holds it; one that nobody holds is removed."""
    try:
        ticket = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(ticket, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(ticket)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}"
