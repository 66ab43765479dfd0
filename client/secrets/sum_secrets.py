"""A site's secrets of the secure sum that is going on, on its own disk, for its owner alone.

Between two stages the process of a question ends, so keys, the seed and the shares of others lie in
`secure_sum/<plan>/round-0003.sum`, mode 0600, written whole. One file: what an earlier attempt or round left
goes when a new one begins, so that nobody, this site included, can open an attempt that was given up. What
left already can be given again without them (`client/books/answers.py`).

Does not do: say what may be told of them (`privacy/secure_sum/party.py`), or leave the site.
"""

import logging
from pathlib import Path

from privacy.secure_sum.party import Party
from privacy.secure_sum.transcript import Attempt, SumRefused
from storage.files import private_folder, write_whole

FOLDER = "secure_sum"
"""The folder, in the site's state folder."""
_log = logging.getLogger(__name__)


class SumSecrets:
    """The secrets of one site under one plan."""

    def __init__(self, state_dir: Path, plan_sha256: str) -> None:
        self._folder = state_dir / FOLDER / plan_sha256[:12]

    def begun(self, attempt: Attempt) -> Party | None:
        """This site in this attempt; None when it has not begun it. Raises `SumRefused` when it has begun a
        later one at this round."""
        party = self._read(attempt.round)
        if party is None or party.attempt < attempt:
            return None
        if party.attempt != attempt:
            raise SumRefused(
                f"Expected attempt {party.attempt.number} of round {attempt.round} or a later one; got "
                f"{attempt.number}, which this site has given up."
            )
        return party

    def of(self, attempt: Attempt) -> Party:
        """This site in this attempt, which it has begun; raises `SumRefused`."""
        if (party := self.begun(attempt)) is None:
            raise SumRefused(
                f"Expected the secrets of attempt {attempt.number} of round {attempt.round}; there are none."
            )
        return party

    def keep(self, party: Party) -> None:
        """Keep these secrets, and no others; on the disk when this returns."""
        private_folder(self._folder)
        path = self._path(party.attempt.round)
        write_whole(path, party.to_text())
        for other in self._folder.iterdir():
            if other != path:
                other.unlink()

    def _read(self, round_number: int) -> Party | None:
        path = self._path(round_number)
        if not path.is_file():
            return None
        try:
            return Party.from_text(path.read_text(encoding="ascii"))
        except ValueError as error:  # SumRefused is one
            _log.warning("%s is passed over, and the attempt is lost to this site: %s", path.name, error)
            return None

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:04d}.sum"
