"""What is promised about a release: whose contribution is bounded, by how much, and where noise enters.

A release is a sum over contributors, or, where a site has agreed to that, the shares of single contributors
side by side. The promise bounds the L2 norm of one contributor's share. What was made of random numbers
alone, as the keys of a secure sum are, has nothing to bound. Noise enters
nowhere in this version: the promise is a bound, not differential privacy, and it says so in words and as an
epsilon of infinity. What travels beside the sum (counts, losses, seconds) is not covered by the bound.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The guarantee under which one kind of release leaves a site.

    Guarantee: adding or removing one `unit` changes the released sum by at most `bound` in L2 norm (times the
    unit's weight, for a weighted sum). With `each` there is no sum: a row is one unit's share, at most
    `bound` long, and the release hides nobody. Not covered: counts and metrics that travel beside it.
    """

    kind: str
    """What is released: the word under which ledger and journal know it."""
    bound: float
    """L2 norm of one contributor's share."""
    unit: Literal["site update", "patient statistics", "scan", "no patient"]
    """Whose share is bounded."""
    enforcement: Literal["clip", "check", "each", "none"]
    """`clip`: the gate scales a mean that is too long. `check`: shares were bounded where they were summed;
    the gate refuses a sum that is longer than its number of shares allows. `each`: every row is one
    contributor's share, and the gate scales each that is too long. `none`: nothing of a patient is in it, so
    there is nothing to bound (`bound` is 0)."""
    relation: Literal["add or remove one"] = "add or remove one"
    """Which two cohorts count as neighbours."""
    noise_in: Literal["nowhere"] = "nowhere"
    """Where noise enters."""

    def __post_init__(self) -> None:
        """Refuse a bound that bounds nothing."""
        if self.enforcement == "none":
            if self.bound != 0 or self.unit != "no patient":
                raise ValueError(f"Expected a bound of 0 where nothing is bounded; got {self.bound}.")
        elif not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"Expected a promise with a finite bound > 0; got {self.bound}.")

    @property
    def epsilon(self) -> float:
        """What the release costs: infinity, as no noise is added; nothing, where no patient is in it."""
        return 0.0 if self.enforcement == "none" else math.inf

    def sentence(self) -> str:
        """The promise in plain words, for the journal and for people."""
        if self.enforcement == "none":
            return "Made of random numbers of this site and others: nothing of a patient is in it."
        if self.enforcement == "each":
            return (
                f"Each {self.unit} leaves by itself, at most {self.bound:g} long (L2): patient data, "
                f"from which the {self.unit} can be reconstructed. No sum hides it, so the minimum cohort "
                "protects nobody; no noise is added, so epsilon is infinite."
            )
        return (
            f"One {self.unit} moves this release by at most {self.bound:g} (L2, {self.relation}); "
            "no noise is added, so epsilon is infinite: bounded, not differentially private."
        )
