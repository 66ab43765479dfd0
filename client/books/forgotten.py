"""Who withdrew: the site's own list of patients that take no part any more, without a name in it.

A patient and each of her scans (by the hash of its voxels, so that another name does not bring it back) stand
in `forgotten.json` as hashes under a key of the site. Who reads the file learns nothing of whom; who has a
name can ask whether it is there. Does not do: remove anything (`client/forgetting.py`).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from client.secrets.site_secret import digest_of, site_secret
from forms.json_text import read_json
from storage.files import write_whole

LIST, KEY = "forgotten.json", "forgotten.key"


class Forgotten:
    """The list in a site's state folder; reading it makes neither file."""

    def __init__(self, state_dir: Path) -> None:
        """Raises `ValueError` when the list is damaged, or its key is gone: then nobody can tell who is on
        it."""
        self._path, self._key_path = state_dir / LIST, state_dir / KEY
        self._marks: set[str] = set()
        self._key = b""
        if not self._path.is_file():
            return
        content = self._path.read_bytes()
        marks = read_json(content, f"the list of who withdrew in {self._path}")
        if not isinstance(marks, list) or not all(isinstance(m, str) and len(m) == 64 for m in marks):
            raise ValueError(f"Expected the list of who withdrew in {self._path}; got another. Restore it.")
        if not self._key_path.is_file():
            raise ValueError(f"Expected the key of the list of who withdrew at {self._key_path}. Restore it.")
        self._marks, self._key = set(marks), site_secret(self._key_path)

    @property
    def sha256(self) -> str:
        """Hash of the list: what was remembered before another withdrew does not hold any more."""
        return hashlib.sha256("".join(sorted(self._marks)).encode()).hexdigest()

    def patient(self, name: str) -> bool:
        """Whether this patient withdrew."""
        return bool(self._marks) and self.mark(name) in self._marks

    def scan(self, scan_id: str) -> bool:
        """Whether this scan is of somebody who withdrew."""
        return bool(self._marks) and self._mark("scan", scan_id) in self._marks

    def mark(self, name: str) -> str:
        """The patient as the list has her, 64 hex digits."""
        return self._mark("patient", name)

    def add(self, name: str, scan_ids: Iterable[str]) -> None:
        """Add a patient and her scans; on the disk when this returns."""
        self._key = site_secret(self._key_path)
        marks = self._marks | {self.mark(name), *(self._mark("scan", scan_id) for scan_id in scan_ids)}
        if marks != self._marks:
            write_whole(self._path, json.dumps(sorted(marks), indent=0))
            self._marks = marks

    def _mark(self, kind: str, name: str) -> str:
        return digest_of(self._key or site_secret(self._key_path), "forgotten", kind, name).hex()
