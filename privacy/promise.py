"""What is promised about a release: whose contribution is bounded, by how much, and where noise enters.

A release is a sum over contributors, or, where a site has agreed to that, the shares of single contributors
side by side. The promise bounds the L2 norm of one contributor's share. With a mechanism noise is added, by
the gate or in each step of training, and the promise is differential privacy for each patient; without one
noise enters nowhere, the promise is a bound, and it says so in words and as an epsilon of infinity. What was
made of random numbers alone, as the keys of a secure sum are, has nothing to bound. What travels beside the
sum (counts, losses, seconds) is not covered by the bound; beside noise nothing travels that tells of a
patient.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privacy.accounting import INFINITE, LARGEST_DELTA, Epsilon, Mechanism, Relation, epsilon_of


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The guarantee under which one kind of release leaves a site.

    Guarantee: adding or removing one `unit` changes the released sum by at most `bound` in L2 norm (times the
    unit's weight, for a weighted sum). With `each` there is no sum: a row is one unit's share, at most
    `bound` long, and the release hides nobody. Not covered: counts and metrics that travel beside it. With a
    `mechanism` the unit is a patient, all of whose scans are one share, and what leaves is (epsilon,
    delta)-differentially private for each patient of the site, against everybody outside of it, whatever they
    know. Not covered then: that the site takes part, when and whether it answers, and other releases,
    which the ledger adds up.
    """

    kind: str
    """What is released: the word under which ledger and journal know it."""
    bound: float
    """L2 norm of one contributor's share."""
    unit: Literal["site update", "patient statistics", "scan", "patient", "no patient"]
    """Whose share is bounded."""
    enforcement: Literal["clip", "check", "each", "steps", "samples", "none"]
    """`clip`: the gate scales a mean that is too long. `check`: shares were bounded where they were summed;
    the gate refuses a sum that is longer than its number of shares allows. `each`: every row is one
    contributor's share, and the gate scales each that is too long. `steps`: shares were bounded, and noise
    added, in each step of training; what leaves is a function of that, and as long as it is. `samples`: the
    same, and what leaves was drawn from the model that these steps made. `none`: nothing of a patient is in
    it, so there is nothing to bound (`bound` is 0)."""
    relation: Relation = "add or remove one"
    """Which two cohorts count as neighbours; that of the mechanism, where there is one. With `replace one`
    how many patients there are is not covered."""
    mechanism: Mechanism | None = None
    """The noise that is added; none: none."""
    delta: float | None = None
    """At which delta epsilon is told, with a mechanism."""

    def __post_init__(self) -> None:
        """Refuse a bound that bounds nothing, and noise that protects no patient."""
        if self.enforcement == "none":
            if self.bound != 0 or self.unit != "no patient":
                raise ValueError(f"Expected a bound of 0 where nothing is bounded; got {self.bound}.")
        elif not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"Expected a promise with a finite bound > 0; got {self.bound}.")
        if (self.mechanism is None) != (self.delta is None):
            raise ValueError("Expected a promise with both a mechanism and a delta, or with neither.")
        noised = (
            ("check", "steps", "samples") if self.mechanism is not None else ("clip", "check", "each", "none")
        )
        if self.enforcement not in noised or (self.mechanism is not None and self.unit != "patient"):
            raise ValueError(
                "Expected noise on sums of patients' bounded shares, and in steps always; got unit "
                f"{self.unit!r}, enforcement {self.enforcement!r}."
            )
        if self.relation != ("add or remove one" if self.mechanism is None else self.mechanism.relation):
            raise ValueError(f"Expected the mechanism's relation in its promise; got {self.relation!r}.")
        if self.delta is not None and not 0 < self.delta <= LARGEST_DELTA:
            raise ValueError(f"Expected delta in (0, {LARGEST_DELTA:g}]; got {self.delta}.")

    @property
    def noise_in(self) -> Literal["nowhere", "release", "steps", "generation"]:
        """Where noise enters: in the release, in steps whose result leaves, or in those of a generation, of
        which only samples do."""
        if self.mechanism is None:
            return "nowhere"
        return "generation" if self.enforcement == "samples" else "steps" if self.in_steps else "release"

    @property
    def in_steps(self) -> bool:
        """Whether shares are bounded, and noise added, in each step of training."""
        return self.enforcement in ("steps", "samples")

    @property
    def deviation(self) -> float:
        """Of the noise in each number of a sum; 0 without a mechanism."""
        return 0.0 if self.mechanism is None else self.mechanism.noise_multiplier * self.bound

    @property
    def epsilon(self) -> Epsilon:
        """What this release alone costs a patient: nothing, where no patient is in it; without noise it is
        infinite."""
        if self.enforcement == "none":
            return Epsilon(0.0, 0.0)
        if self.mechanism is None or self.delta is None:
            return INFINITE
        return epsilon_of([self.mechanism], self.delta)

    def sentence(self) -> str:
        """The promise in plain words, for the journal and for people."""
        if self.enforcement == "none":
            return "Made of random numbers of this site and others: nothing of a patient is in it."
        if self.mechanism is not None:
            moved, taken = "it", self.mechanism
            if self.in_steps:
                moved = (
                    f"the sum of a training step, of which there are {taken.steps} and in each of which she "
                    f"is with a chance of {taken.sampling_rate:g},"
                )
            drawn = (
                "What leaves are samples of the model that these steps make, and nothing beside them. "
                if self.enforcement == "samples"
                else ""
            )
            replaced = self.relation == "replace one"
            whether = (
                "whether a patient or another in her place is" if replaced else "whether or not a patient is"
            )
            moves = (2 if replaced else 1) * self.bound
            number = "how many patients the site has, " if replaced else ""
            return (
                f"{drawn}Whoever reads this release learns almost the same {whether} in it: each "
                f"patient, all scans together, moves {moved} by at most {moves:.4g} (L2, "
                f"{self.relation}), and the site adds Gaussian noise of deviation {self.deviation:.4g} from "
                f"a secret of its own. That is epsilon {self.epsilon} at delta {self.delta:g} for this "
                f"release. Not covered: {number}that the site takes part, when and whether it answers, and "
                "what else leaves it."
            )
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

    def record(self) -> dict[str, Any]:
        """As it is kept beside an answer."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "Promise":
        """Back from `record`."""
        mechanism = record["mechanism"]
        known = None if mechanism is None else Mechanism.from_record(mechanism)
        return Promise(**{**record, "mechanism": known})
