"""The judgement memo: a scan that was read before is not read again while its files are as they were.

One line per scan, written as soon as the scan was judged (and encoded, where it is): a run that was killed
goes on behind the last whole line, and of a cohort to which a scan came, only that scan is read. A line is
named by a hash of the files' identities (as in `client/scans/fingerprints.py`), of the settings and of this
package's code; it holds no path and no name. What is damaged is forgotten: those scans are read again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from client.scans.cohort_memo import code_sha256
from client.scans.fingerprints import SETTLED_S
from client.scans.judgement import Judges, Source, Verdict, verdict_from_json, verdict_to_json
from scans.nifti import NIFTI_NAMES
from scans.scans import Reason, UnusableScan
from storage.files import OWNER, private_folder, write_whole


class JudgementMemo:
    """Judgements in the file `memo`; `settings`, JSON: all that decides about a scan besides its files."""

    def __init__(self, memo: Path, settings: Mapping[str, Any]) -> None:
        self._memo = memo
        self._head = hashlib.sha256(json.dumps([code_sha256(), settings], sort_keys=True).encode())
        self._known = _load(memo)
        self._used: dict[str, str] = {}

    def judges(self, ask: Judges) -> Judges:
        """Judges that remember, and `ask` others for what is not known."""

        def judged(sources: Sequence[Source]) -> Iterator[tuple[int, Verdict]]:
            keys = [self._key(source) for source in sources]
            asked = []
            for number, key in enumerate(keys):
                verdict = self._remembered(key)
                if verdict is None:
                    asked.append(number)
                else:
                    yield number, verdict
            for place, verdict in ask([sources[number] for number in asked]):
                number = asked[place]
                self._keep(keys[number], verdict)
                yield number, verdict
            self._save([key for key in keys if key])

        return judged

    def _key(self, source: Source) -> str:
        """The line's name; empty for files so young that they could change again within the clock's grain."""
        digest, newest_ns = self._head.copy(), 0
        for path in (*source.files, *([source.label] if source.label else [])):
            try:
                status = path.stat()
            except OSError:
                return ""
            newest_ns = max(newest_ns, status.st_mtime_ns, status.st_ctime_ns)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            claims = [path.name.lower().endswith(end) for end in NIFTI_NAMES]  # is judged, too
            digest.update(f"{identity}{claims}{path == source.label}\n".encode())
        return digest.hexdigest() if time.time() - newest_ns / 1e9 > SETTLED_S else ""

    def _remembered(self, key: str) -> Verdict | None:
        line = self._known.get(key)
        if line is None:
            return None
        try:
            verdict = verdict_from_json(json.loads(line))
        except (ValueError, KeyError, TypeError):
            return None
        self._used[key] = line
        return verdict

    def _keep(self, key: str, verdict: Verdict) -> None:
        if not key or (isinstance(verdict, UnusableScan) and verdict.reason is Reason.UNREADABLE):
            return  # a disk that is away may be back without any file having changed
        self._used[key] = line = json.dumps(verdict_to_json(verdict))
        if not self._memo.exists():
            private_folder(self._memo.parent)
            self._memo.touch(mode=OWNER)
        with self._memo.open("a") as file:
            file.write(f"\n{key} {line}\n")  # a line of its own even behind one that was cut

    def _save(self, keys: Sequence[str]) -> None:
        """Write what was asked for, and only that, in order: files that are gone are forgotten."""
        kept = {key: self._used[key] for key in keys if key in self._used}
        if kept != self._known or list(kept) != list(self._known):
            write_whole(self._memo, "".join(f"{key} {line}\n" for key, line in kept.items()))
            self._known = kept


def without_scans(memo: Path, gone: Callable[[str], bool]) -> None:
    """Remove the judgements of these scans, by their ids, from the file `memo`; of files that nobody asks for
    any more, too."""
    if memo.is_file():
        kept = {key: line for key, line in _load(memo).items() if not gone(_scan_id(line))}
        write_whole(memo, "".join(f"{key} {line}\n" for key, line in kept.items()))


def _scan_id(line: str) -> str:
    try:
        return str(json.loads(line).get("scan_id", ""))
    except ValueError:
        return ""


def _load(memo: Path) -> dict[str, str]:
    try:
        lines = memo.read_bytes().decode("ascii", "replace").splitlines()
    except FileNotFoundError:
        return {}
    parts = (line.partition(" ") for line in lines)
    return {key: line for key, _, line in parts if len(key) == 64 and line.endswith("}")}
