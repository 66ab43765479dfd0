"""Whose labels are used: so many patients (of each class), or a share of them, drawn anew for every draw.

The few-label protocol of the field: 1, 2, 5 and 10 patients (of each class, where classes are predicted) and
10 to 100% of them, many draws of each. Within a draw the patients of a smaller number are among those of
every larger one. Draw 0 of a share is the draw that `LabelledScans.share` makes.
What this file does not do: it trains nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from client.latents.labelled import LabelledScans
from meduet_models.seeds import digest_of

_APART = 1_000_003  # between the seeds of two draws


@dataclass(frozen=True)
class Amount:
    """How many labels: a number of patients, or a share of them."""

    count: int | None = None
    """Patients; where classes are predicted, of each class."""
    share: float | None = None

    @property
    def name(self) -> str:
        """As tables have it: `5`, or `10%`."""
        return f"{self.count}" if self.share is None else f"{100 * self.share:g}%"

    def drawn(self, train: LabelledScans, per_class: bool, seed: int, draw: int) -> LabelledScans | None:
        """The scans of the patients drawn; None where there are fewer patients than asked for.

        Raises `ValueError` for a share that is not above 0 and at most 1.
        """
        if self.share is not None:
            return train.share(self.share, seed + draw * _APART)
        assert self.count is not None
        order = sorted(train.patients, key=lambda patient: _place(seed, draw, patient))
        groups = _by_class(train, order) if per_class else [order]
        if any(len(group) < self.count for group in groups):
            return None
        kept = {patient for group in groups for patient in group[: self.count]}
        return train.rows([row for row, patient in enumerate(train.patient) if patient in kept])


def amounts(counts: Sequence[int], shares: Sequence[float]) -> list[Amount]:
    """Numbers of patients, then shares."""
    return [*(Amount(count=count) for count in counts), *(Amount(share=share) for share in shares)]


def rank_of(name: str) -> tuple[bool, float]:
    """Places of names of amounts in a table: numbers of patients first, each from few to many."""
    share = name.endswith("%")
    try:
        return share, float(name.removesuffix("%"))
    except ValueError:
        return True, math.inf


def _by_class(train: LabelledScans, order: Sequence[str]) -> list[list[str]]:
    """The patients of each class, by the class of a patient's first scan."""
    first: dict[str, int] = {}
    for row, patient in enumerate(train.patient):
        first.setdefault(patient, int(train.answers[row]))
    return [[name for name in order if first[name] == one] for one in sorted(set(first.values()))]


def _place(seed: int, draw: int, patient: str) -> bytes:
    return digest_of(f"fedmeduet labels {seed} draw {draw}", patient, separator="\0")
