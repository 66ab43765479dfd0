"""The secret randomness of a round of noisy steps: who is in a step, what is drawn for her, and its noise.

All of it comes from one key of the round (`privacy/randomness.py`), in streams by step and patient: what is
drawn for one patient does not depend on who else is there, so that her being there or not moves a step's sum
by her own share alone. A round that was killed draws the same again; no seed of a plan does.

What this file does not do: bound a share (`privacy/group_gradients.py`), or decide how much noise is enough
(`privacy/accounting.py`).
Source: DP-SGD (arXiv:1607.00133), with Poisson sampling.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from privacy.randomness import SecretSource, Stream

_BELOW = 2**53


class StepSecrets:
    """The steps of one round; `words` tell them from all others under the same key."""

    def __init__(self, source: SecretSource, words: tuple[object, ...], deviation: float) -> None:
        self._source, self._words, self.deviation = source, words, deviation
        self.last: int | None = None
        """The last step that got its noise."""

    def to_text(self) -> str:
        """All of it, the key too: for a process of the site's own, in a file that only its owner reads."""
        return json.dumps([self._source.key.hex(), self._words, self.deviation])

    @staticmethod
    def from_text(text: str) -> "StepSecrets":
        """What `to_text` told. Raises `ValueError` for another text."""
        try:
            key, words, deviation = json.loads(text)
            return StepSecrets(SecretSource(bytes.fromhex(key)), tuple(words), float(deviation))
        except (ValueError, TypeError):
            raise ValueError("Expected key, words and deviation of noisy steps; got another text.") from None

    @property
    def fingerprint(self) -> str:
        """Another key has another; tells nothing of the key. Stays at the site."""
        return hashlib.sha256(self._stream("fingerprint").uniforms(4).tobytes()).hexdigest()

    def apart(self, word: str) -> "StepSecrets":
        """The same key with streams of its own: for contributors who are no patients."""
        return StepSecrets(self._source, (*self._words, word), self.deviation)

    def go_on(self, done: int) -> None:
        """So many steps had their noise before, and are on disk with it."""
        self.last = done - 1 if done else None

    def of_patient(self, step: int, patient: str) -> Stream:
        """What is drawn for a patient in a step: whether she is in it, and what of her."""
        return self._stream("patient", step, patient)

    def drawn(self, step: int, patient: str, rate: float) -> torch.Generator | None:
        """A generator for all else that is drawn for her, where she is in the step, which has this chance;
        None where she is not."""
        inside, seed = self.of_patient(step, patient).uniforms(2)
        return torch.Generator().manual_seed(int(seed * _BELOW)) if inside < rate else None

    def noised(self, step: int, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of a step, of nobody as well, with Gaussian noise in each number; float64.

        Guarantee: with sums that one patient moves by at most the promise's bound in L2, and with everybody
        in the step by the promise's chance, it is a step of the promise's mechanism. Raises `ValueError` for
        a step that does not follow the one before: its noise would be drawn for two sums.
        """
        if self.last is not None and step != self.last + 1:
            raise ValueError(f"Expected step {self.last + 1} of the round; got {step}.")
        self.last = step
        return {
            name: total.double().cpu()
            + self.deviation * self._stream("noise", step, name).normals(tuple(total.shape))
            for name, total in sums.items()
        }

    def into_gradients(
        self, step: int, sums: Mapping[str, Tensor], trained: Mapping[str, Tensor], expected: float
    ) -> None:
        """What an optimiser is given of a step: its sums with noise, over the number of shares that are
        expected in them, as the gradients of what is trained. As `noised`."""
        for name, noised in self.noised(step, sums).items():
            trained[name].grad = (noised / expected).to(trained[name])

    def _stream(self, *words: object) -> Stream:
        return self._source.stream("steps", *self._words, *words)
