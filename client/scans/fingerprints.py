"""Fingerprints: the content hash of every file of a site, without reading an unchanged file twice.

A memo says which file identity (device, inode, size, times of change) had which SHA-256. It holds no path and
no name. The inode's change time cannot be set by hand, so a file edited in place and given its old size and
time back is read again, all the same. A file younger than two seconds is never remembered: it could change
again within the clock's grain.

Does not do: watch folders; say which scan is which (`client/scans/cohort.py`).
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

SETTLED_S = 2.0
"""A file must be this old before its hash is remembered (git's "racily clean" rule)."""


class Fingerprints:
    """SHA-256 of files, remembered in the JSON file `memo` (created by `save`, readable by its owner only).

    A memo that is damaged is forgotten, never trusted: the files are read again.
    """

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._known: dict[str, str] = {}
        self._used: dict[str, str] = {}
        self.num_read = 0
        try:
            loaded = json.loads(memo.read_text())
        except (FileNotFoundError, ValueError):
            return
        if isinstance(loaded, dict) and all(isinstance(v, str) and len(v) == 64 for v in loaded.values()):
            self._known = loaded

    def sha256(self, path: Path) -> str:
        """Hash of the file's bytes, 64 hex digits; reads the file only if it may have changed.

        Raises `OSError` when the file cannot be read.
        """
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{times[0]}:{times[1]}"
        known = self._used.get(identity) or self._known.get(identity)
        if known is None:
            with path.open("rb") as file:
                known = hashlib.file_digest(file, "sha256").hexdigest()
            self.num_read += 1
        if time.time() - max(times) / 1e9 > SETTLED_S:
            self._used[identity] = known
        return known

    def save(self) -> None:
        """Write what was asked for since opening, and only that: files that are gone are forgotten."""
        if self._used != self._known:
            write_atomically(self._memo, json.dumps(self._used).encode())
            self._known = dict(self._used)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all, readable by its owner only.

    Written beside it, forced to the disk, then renamed. Raises `OSError` (a full disk, say); the file that
    was there before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)  # mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
