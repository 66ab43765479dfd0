"""Locks on files, which go with the process that holds them, however it ends.

What this file does not do: wait (whoever wants a lock knows for how long), or take turns (`client/turns.py`).
"""

import fcntl
from pathlib import Path
from typing import TextIO


def locks(lock: TextIO) -> bool:
    """Take the lock of an open file if nobody holds it, until it closes; whether it was taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file now."""
    if not path.is_file():
        return False
    with path.open("a", encoding="utf-8") as lock:
        return not locks(lock)
