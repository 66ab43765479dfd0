"""The answers that left a site, on its own disk: the same question is given the same bytes again.

A release may be lost on its way, or the centre goes back to an older checkpoint and asks again. Computed anew
it could be another one: a patient came, a library changed. So what passed the gate lies in
`answers/<plan>/<kind>-0003.safetensors`, for its owner only and with hashes, written before the charge in the
ledger; the gate lets it out again when the ledger says that this very answer left. Of each kind the answers
of the newest three rounds are kept; an older one is computed again, and leaves only if it is the same. Who
loses the newest together with the state after it answers that question anew, once. Beside an answer with
noise lies, until it has left, the key that its noise is drawn from.

Does not do: let anything out by itself (`client/release.py`), or keep latents of single scans: those are in
the cache already.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meduet_models.weights import load_weights, save_weights, sha256_of_tensors
from privacy.ledger import Place
from privacy.promise import Promise
from privacy.randomness import SecretSource

ANSWERS = "answers"
"""The folder, in the site's state folder."""
SECRET = ".secret"
"""What the name of a key of noise ends in."""
KEPT = 3
"""Rounds of which a site keeps its answers, of each kind."""
_ROUND = re.compile(r"(?P<kind>[a-z_]+)-(?P<round>\d{4,})(-\w+)?\.safetensors")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What passed the gate: tensors as they travel, and the line of the journal without its charge."""

    tensors: Mapping[str, Tensor]
    """Rounded to the wire's type, as float32 or float64."""
    record: Mapping[str, Any]
    """The line of the journal."""
    promise: Promise
    """Under which promise."""


class KeptAnswers:
    """The answers of one site, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, place: Place, sha256: str) -> Answer | None:
        """The answer that left for `place`, whose tensors have this hash; None where it is not kept."""
        path = self._path(place)
        if not path.is_file():
            return None
        try:
            tensors, provenance = load_weights(path)
        except ValueError as error:
            _log.warning("%s is not used, and the answer is computed again: %s", path.name, error)
            return None
        if sha256_of_tensors(tensors) != sha256:
            _log.warning("%s is not used: it is not the answer that left.", path.name)
            return None
        promise = Promise.from_record(json.loads(provenance["promise"]))
        return Answer(tensors, json.loads(provenance["record"]), promise)

    def write(self, place: Place, answer: Answer) -> None:
        """Keep `answer`; those of older rounds go. A disk that takes nothing costs this safety, not the
        round: it is said in the log."""
        path = self._path(place)
        metadata = {
            "record": json.dumps(dict(answer.record)),
            "promise": json.dumps(answer.promise.record()),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_weights(path, answer.tensors, metadata)
        except OSError as error:
            _log.warning("%s could not be written: %s", path.name, error)
            return
        rounds = sorted(
            (int(match["round"]), other)
            for other in path.parent.iterdir()
            if (match := _ROUND.fullmatch(other.name)) and match["kind"] == place.kind
        )
        for _, old in rounds[:-KEPT]:
            old.unlink(missing_ok=True)

    def secret(self, place: Place) -> SecretSource:
        """What the noise of the answer for `place` is drawn from: made when it is first needed, so that a
        killed site draws the same again."""
        return SecretSource.at(self._path(place).with_suffix(SECRET))

    def forget_secret(self, place: Place) -> None:
        """Remove it once the answer is kept: who reads the key could take the noise out of what left."""
        path = self._path(place)
        if path.is_file():
            path.with_suffix(SECRET).unlink(missing_ok=True)

    def _path(self, place: Place) -> Path:
        part = f"-{place.part}" if place.part else ""
        return self._folder / place.plan_sha256[:12] / f"{place.kind}-{place.round:04d}{part}.safetensors"
