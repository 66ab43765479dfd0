"""What was said in the secure sum of a round, on the centre's disk, before it is used in the next question.

A centre that is killed asks on as it began: the same attempt, the same roster, the same texts and, above all,
the same list of survivors, since sites open a round's sum for one list only. Nothing in it is secret from the
centre: public keys, texts that it cannot open, names. Masked vectors are not kept; sites give them again.

What this file does not do: it decides nothing (`server/exchanges/secure_sum.py`).
"""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

from forms.form import build
from forms.json_text import canonical, read_json
from storage.files import private_folder, write_whole

KEPT = 3
"""Rounds of which it is kept: as many as checkpoints are (`server/checkpoints.py`)."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SumRecord:
    """One attempt, as far as it has come."""

    attempt: int = 1
    announced: dict[str, str] = field(default_factory=dict)
    """What each site announced, by name; empty before."""
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each site that shared: the text for each of the others, hex; empty before."""
    survivors: tuple[str, ...] = ()
    """The list; empty before."""


class SumRecords:
    """The records of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, round_number: int) -> SumRecord:
        """How far the round had come; a first attempt where nothing, or nothing whole, is there."""
        path = self._path(round_number)
        if not path.is_file():
            return SumRecord()
        try:
            said = read_json(path.read_text(encoding="ascii"), f"the record {path}", longest=1 << 30)
            return build(SumRecord, said, "sum")
        except ValueError as error:
            _log.warning("%s is passed over: %s", path.name, error)
            return SumRecord()

    def write(self, round_number: int, record: SumRecord) -> None:
        """Keep it; on the disk when this returns. Those of older rounds go."""
        private_folder(self._folder)
        write_whole(self._path(round_number), canonical(dataclasses.asdict(record)))
        for path in sorted(self._folder.glob("round-*.json"))[:-KEPT]:
            path.unlink()

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:04d}.json"
