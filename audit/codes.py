"""Content of candidates under the weights of a question, computed once for all attacks that read it.

What this file does not do: bound anything; a release's own bound is applied by whoever attacks it.

Axes: n = patients, q = numbers in a content code, k = content channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from audit.cohort import Cohort
from meduet_models.meduet import FactorNetwork, layer_normed

_SCANS_AT_ONCE = 16


@dataclass(frozen=True)
class Codes:
    """What a site computes of each of its patients before it sums."""

    code: Float64[Tensor, "n q"]
    """The content code."""
    pooled: Float64[Tensor, "n k"]
    """The mean of the content tokens."""


@torch.no_grad()
def codes_of(network: FactorNetwork, cohort: Cohort) -> Codes:
    """Both, of every candidate, from one pass of the encoder."""
    content = [network.encode(some).content for some in _chunks(cohort)]
    code = torch.cat([network.coded(one) for one in content])
    pooled = torch.cat([layer_normed(one).mean(1) for one in content])
    return Codes(cohort.per_person(code), cohort.per_person(pooled))


class KnownCodes:
    """The codes that were computed already, by network and site."""

    def __init__(self) -> None:
        self._known: dict[tuple[FactorNetwork, str], Codes] = {}

    def of(self, network: FactorNetwork, cohort: Cohort) -> Codes:
        """As `codes_of`; the second time nothing is computed."""
        key = network, cohort.site
        if key not in self._known:
            self._known[key] = codes_of(network, cohort)
        return self._known[key]


def _chunks(cohort: Cohort) -> Iterator[Tensor]:
    for first in range(0, len(cohort.latents), _SCANS_AT_ONCE):
        yield cohort.latents[first : first + _SCANS_AT_ONCE]
