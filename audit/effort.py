"""How much of an audit is done: all, or what takes minutes.

What this file does not do: say what is attacked (`attacks.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    draws: int = 16
    """Draws of hidden tokens behind a loss."""
    every_round: bool = True
    """Whether each release that is at hand is attacked, or the newest of each kind."""
    iterations: int = 350
    """Of the search that turns a gradient back into scans; 0: it is not tried."""
    restarts: int = 2
    """Starts of that search."""
    null_draws: int = 1000
    """Draws of nobody's membership for each score."""


QUICK = Effort(draws=4, every_round=False, iterations=0, null_draws=100)
