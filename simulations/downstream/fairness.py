"""FairnessScore: is a network as good for everybody? Over sites, sexes and age bands.

The score is the metric over all test patients divided by 1 + the standard deviation of the metric over the
groups: the metric itself when every group has the same, less the further they are apart. It is the
equity-scaled metric of FairSeg (Tian et al. 2024, arXiv:2311.02189, first version). A metric below 0 is
multiplied instead, so that spread never flatters. Groups with few test patients are left out and not guessed.
Dice is smaller for smaller structures whoever draws them, so that groups of different volumes differ in Dice
without any unfairness.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_PATIENTS = 3
"""Of a group, to be read."""
AGE_BANDS = (40.0, 60.0)


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """The score of one network on one test set, over one way to group its patients."""

    mode: str
    labels: str
    test: str
    metric: str
    grouping: str
    """site, sex or age."""
    score: float
    groups: Mapping[str, float]
    """The metric in each group."""
    patients: Mapping[str, int]
    """Patients of each group."""


def fairness_score(overall: float, groups: Sequence[float]) -> float:
    """The metric, scaled by how far groups are apart; NaN with fewer than two groups."""
    if len(groups) < 2:
        return math.nan
    spread = 1 + float(np.std(groups))
    return overall / spread if overall >= 0 else overall * spread


def age_band(age: float) -> str:
    """The band of an age in years."""
    low, high = AGE_BANDS
    if age < low:
        return f"under {low:g}"
    return f"{low:g} to {high:g}" if age < high else f"{high:g} and over"


def groups_of(covariates: Sequence[Mapping[str, str | float]]) -> dict[str, tuple[str, ...]]:
    """By grouping, the group of each scan, empty where it is unknown; what is known of nobody is left out."""
    found = {
        "sex": tuple(str(known.get("sex", "")) for known in covariates),
        "age": tuple(
            age_band(float(age)) if isinstance(age := known.get("age"), (int, float)) else ""
            for known in covariates
        ),
    }
    return {grouping: names for grouping, names in found.items() if any(names)}
