"""Fingerprints: the content hash of every file of a site, without reading an unchanged file twice.

A memo says which file identity (device, inode, size, times of change) had which SHA-256. It holds no path and
no name. The inode's change time cannot be set by hand, so a file edited in place and given its old size and
time back is read again, all the same. A file younger than two seconds is never remembered: it could change
again within the clock's grain.

Does not do: watch folders; say which scan is which (`client/scans/cohort.py`).
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from storage.files import write_whole

SETTLED_S = 2.0
"""A file must be this old before its hash is remembered (git's "racily clean" rule)."""


class Fingerprints:
    """SHA-256 of files, remembered in the JSON file `memo` (created by `save`, readable by its owner only).

    A memo that is damaged is forgotten, never trusted: the files are read again. `load` and `save` say how
    it is kept: in clear, or sealed as the cache's other files are.
    """

    def __init__(
        self,
        memo: Path,
        load: Callable[[Path], str] = Path.read_text,
        save: Callable[[Path, str], None] = write_whole,
    ) -> None:
        self._memo, self._write = memo, save
        self._known: dict[str, str] = {}
        self._used: dict[str, str] = {}
        self.num_read = 0
        try:
            loaded = json.loads(load(memo))
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
            self._write(self._memo, json.dumps(self._used))
            self._known = dict(self._used)
