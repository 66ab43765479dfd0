"""What a round of training gives: still inside the site.

Does not do: leave the site (`client/release.py` is the only way out), or last (`client/answers.py` keeps what
left).
"""

from dataclasses import dataclass

from torch import Tensor


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
