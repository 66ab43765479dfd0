"""Adding up masked vectors: each is checked alone, added modulo 2^32 and dropped.

Four bytes per value, however many sites reply. A masked vector tells nothing of what it holds, so nothing of
it can be judged but its size; the sum can, once it is open.
What this file does not do: it asks nobody (`server/exchanges/secure_sum.py`), and knows no mask
(`privacy/secure_sum/`).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from federation.wire.sum_layout import MASKED, SumLayout, SumOfSites
from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import Opened
from privacy.secure_sum.ring import Ring
from privacy.secure_sum.transcript import Attempt, Roster, SumRefused, SurvivorList
from strategies.aggregation import ReplyRefused


class RingSum:
    """The sum of one attempt at a round."""

    def __init__(self, layout: SumLayout) -> None:
        self.layout = layout
        self.sites: list[str] = []
        """Whose vectors are in it, in the order in which they came."""
        self._total: Ring | None = None

    def fold(self, site: str, masked: Mapping[str, Tensor]) -> None:
        """Add a site's vector; raises `ReplyRefused`, and leaves the sum as it was, when it is none."""
        vector = masked.get(MASKED)
        if set(masked) != {MASKED} or vector is None or vector.dtype != torch.uint32:
            raise ReplyRefused(f"Expected one masked vector; got {len(masked)} tensors.")
        if tuple(vector.shape) != (self.layout.size,):
            raise ReplyRefused(f"Expected a vector of {self.layout.size} values; got {tuple(vector.shape)}.")
        if self._total is None:
            self._total = np.array(vector.numpy())  # memory of its own: what came is read only
        else:
            np.add(self._total, vector.numpy(), out=self._total)
        self.sites.append(site)

    def opened(
        self,
        attempt: Attempt,
        roster: Roster,
        said: SurvivorList,
        answers: Mapping[str, Opened],
        least: int,
    ) -> SumOfSites:
        """What the sum says, once the masks are out of it; its memory becomes the mean's.

        Raises `SumRefused` when the masks cannot be put together, or what is left is no sum of such sites.
        """
        if self._total is None or set(self.sites) != said.survivors:
            raise SumRefused("Expected the vectors of the survivors on the list, and no others.")
        unmask(self._total, attempt, roster, said, answers, least)
        return self.layout.decoded(self._total, len(self.sites))
