"""A bank's items as examples, in an order that does not change: what training draws from.

What this file does not do: choose the items (`LatentBank.source`), or open records (`bank.py`).

Axes: b = items.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from meduet_models.diffusion.conditions import Examples
from server.latent_bank.records import RecordLayout


class Records(Protocol):
    """What a source needs of a bank (`bank.py`)."""

    @property
    def layout(self) -> RecordLayout:
        """What a record holds."""

    def records(self, numbers: Sequence[int]) -> "tuple[np.ndarray[Any, Any], list[bool]]":
        """Records of these items, and which of them could be read."""


class LatentSource:
    """An `ExampleSource`. An item that became damaged, or was withdrawn, since the source was made is read as
    the next one that is sound."""

    def __init__(self, latent_bank: Records, numbers: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        self._latent_bank, self._numbers = latent_bank, numbers

    def __len__(self) -> int:
        """Items there were."""
        return len(self._numbers)

    def read(self, rows: Int[Tensor, " b"]) -> Examples:
        """These items. Raises `ValueError` when none can be read."""
        return self._latent_bank.layout.unpack(self._records(rows))

    def codes(self, rows: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """Pooled content and style codes of these items; no columns where the bank has none."""
        records = self._records(rows)
        layout = self._latent_bank.layout
        return (
            torch.from_numpy(np.array(records["content"]))
            if layout.content
            else torch.empty(len(records), 0),
            torch.from_numpy(np.array(records["style"])) if layout.style else torch.empty(len(records), 0),
        )

    def _records(self, rows: Tensor) -> "np.ndarray[Any, Any]":
        chosen = self._numbers[rows.numpy()]
        records, sound = self._latent_bank.records(chosen.tolist())
        for place, row in enumerate(rows.tolist()):
            step = 1
            while not sound[place]:
                if step >= len(self):
                    raise ValueError("Expected a sound item in the latent bank; none opens.")
                number = int(self._numbers[(row + step) % len(self)])
                records[place : place + 1], (sound[place],) = self._latent_bank.records([number])
                step += 1
        return records
