"""A round under way, on the site's own disk: what a process that is killed in the middle of it leaves behind.

While a round trains, all that its steps change is written every so often beside the states,
`state/<plan>/round-0003.partial.safetensors`: whole or not at all, for its owner only, with hashes. When the
same question comes again (same plan, round, weights and bank that came, state and cohort to begin from), the
round goes on after the last step that was written, and ends in the bits it would have had. Anything else that
lies there is removed, with a line in the site's log, and the round begins anew. So is a partial round once
the round's own state is kept (`client/training/site_state.py`).

Does not do: steps (`client/training/pretraining.py`, `client/exchanges/diffusion.py`), leave the site, or
keep rounds of fine-tuning: they are short.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from client.latents.batches import TrainingScans
from meduet_models.weights import StoredWeights, open_weights, save_weights, sha256_of_tensors

SUFFIX = ".partial.safetensors"

SHARE_OF_TIME = 0.05
"""Of a round's time, the most that is spent writing it down; a large network is written less often."""

_STEPS, _SECONDS, _ROUND = "partial/steps", "partial/seconds", "round/"
_log = logging.getLogger(__name__)


class _Unusable(ValueError):
    """What lies there is damaged, or belongs to another question."""


class PartialRound:
    """One round under way at one site.

    `question`: everything on which the round depends, by name, as short texts (hashes); kept in the file's
    header. `every_s`: seconds between two writes, or more if writing takes long (`SHARE_OF_TIME`); 0 for
    after each step, whatever that takes. A shorter round writes nothing.
    """

    def __init__(
        self,
        path: Path,
        question: Mapping[str, str],
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._question, self._every_s, self._clock = path, dict(question), every_s, clock
        self._last, self._pause_s = clock(), every_s

    def resume(self, load: Callable[[StoredWeights], None]) -> tuple[int, float]:
        """Steps already done and seconds already spent, once `load` took the tensors; (0, 0.0) when there is
        nothing that this question could go on from.

        `load` raises `ValueError` before it changes anything when the tensors are not what it wants.
        """
        self._last = self._clock()
        if not self._path.is_file():
            return 0, 0.0
        try:
            tensors = self._read()
            steps, seconds = int(tensors[_STEPS]), float(tensors[_SECONDS])
            load(tensors.part(_ROUND))
        except (ValueError, KeyError) as error:
            self._path.unlink(missing_ok=True)
            _log.warning("%s is removed, and the round begins anew: %s", self._path.name, error)
            return 0, 0.0
        _log.warning("The round was interrupted after step %d or later; it goes on from there.", steps)
        return steps, seconds

    def offer(self, steps: int, seconds: float, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write what `tensors` gives, if it is time to: the round after `steps` steps and `seconds` seconds.

        A disk that takes nothing costs this safety, not the round: it is said in the log.
        """
        began = self._clock()
        if began - self._last < self._pause_s:
            return
        counted = {_STEPS: torch.tensor(steps), _SECONDS: torch.tensor(seconds, dtype=torch.float64)}
        whole = {f"{_ROUND}{name}": tensor for name, tensor in tensors().items()} | counted
        try:
            save_weights(self._path, whole, {**self._question, "tensors_sha256": sha256_of_tensors(whole)})
        except OSError as error:
            _log.warning("%s could not be written after step %d: %s", self._path.name, steps, error)
        self._last = self._clock()
        if self._every_s > 0:
            self._pause_s = max(self._every_s, (self._last - began) / SHARE_OF_TIME)

    def _read(self) -> StoredWeights:
        tensors, provenance = open_weights(self._path)
        expected = self._question | {"tensors_sha256": sha256_of_tensors(tensors)}
        if wrong := sorted(name for name, value in expected.items() if provenance.get(name) != value):
            raise _Unusable(f"its {wrong[0]} is another.")
        return tensors


def cohort_sha256(scans: TrainingScans) -> str:
    """Hash of who trains, scan by scan: a cohort that changed begins its round anew. Stays at the site."""
    people = [scans.patients[row] for row in scans.indices("train")]
    return hashlib.sha256(json.dumps(people).encode()).hexdigest()
