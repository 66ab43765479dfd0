"""What a round gives, and a copy of it on the site's own disk until the next round is over.

An answer may be lost on its way: the centre was down for a minute, goes back to its last checkpoint and asks
again. A site that was done with the round then answers from `state/<plan>/round-0003.result.safetensors`,
through the gate again and to the same bits, without another hour of training. The same question only (plan,
round, weights and bank that came, state and cohort); a file that is damaged or answers another is not used.

Does not do: leave the site, or keep what fine-tuning gives: its rounds are short.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from meduet_models.weights import load_weights, save_weights, sha256_of_tensors

SUFFIX = ".result.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a round gives: still inside the site."""

    update: dict[str, Tensor]
    """Shared weights after minus before, by name; float32 on the CPU."""
    metrics: dict[str, float]
    """What the steps told: means of loss terms and gradient norm, last learning rate, seconds (those before
    an interruption, as far as they were written down, included)."""
    examples: int
    """Training scans of this site: the weight of its update."""


class KeptResult:
    """The result of one round at one site; `question`: everything on which it depends, as short texts."""

    def __init__(self, path: Path, question: Mapping[str, str]) -> None:
        self._path, self._question = path, dict(question)

    def read(self) -> RoundResult | None:
        """The result, if this question was answered before and what was kept is whole."""
        if not self._path.is_file():
            return None
        try:
            update, provenance = load_weights(self._path)
        except ValueError as error:
            _log.warning("%s is not used, and the round begins anew: %s", self._path.name, error)
            return None
        expected = self._question | {"tensors_sha256": sha256_of_tensors(update)}
        if wrong := sorted(name for name, value in expected.items() if provenance.get(name) != value):
            _log.warning("%s is not used: its %s is another.", self._path.name, wrong[0])
            return None
        _log.warning("The round was answered before; the same answer leaves again.")
        metrics: dict[str, float] = json.loads(provenance["metrics"])
        return RoundResult(update=update, metrics=metrics, examples=int(provenance["examples"]))

    def write(self, result: RoundResult) -> None:
        """Keep `result`. A disk that takes nothing costs this safety, not the round: the log says so."""
        told = {"metrics": json.dumps(result.metrics), "examples": str(result.examples)}
        whole = {**self._question, **told, "tensors_sha256": sha256_of_tensors(result.update)}
        try:
            save_weights(self._path, result.update, whole)
        except OSError as error:
            _log.warning("%s could not be written: %s", self._path.name, error)
