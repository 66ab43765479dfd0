"""The candidates of a site: scans that an attacker may hold from elsewhere, and whose they are.

What this file does not do: read a scan.

Axes: n = scans, p = patients, c d h w = latents, t = measured values, d = numbers in a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Cohort:
    """The candidates of a site: scans that somebody may hold, and whether each patient took part."""

    site: str
    latents: Float[Tensor, "n c d h w"]
    patients: tuple[str, ...]
    """Whose each scan is: names that mean nothing elsewhere."""
    took_part: tuple[bool, ...]
    """Of each scan: whether its patient was trained on."""
    measured: Float[Tensor, "n t"] | None = None
    """What was measured of each scan, as it enters the sums; NaN where nothing is known."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each scan, by attribute, which subgroup its patient is of: `sex`, `age`; empty text: not known."""
    covariates: tuple[Mapping[str, str | float], ...] = ()
    """Of each scan, what the site's tables say of its patient; empty: they are not at hand."""

    @property
    def people(self) -> list[str]:
        """Patients in order of first appearance."""
        return list(dict.fromkeys(self.patients))

    @property
    def member(self) -> np.ndarray:
        """Whether each of `people` took part."""
        known = dict(zip(self.patients, self.took_part, strict=True))
        return np.array([known[name] for name in self.people], dtype=bool)

    def drawn(self, rows: Sequence[int]) -> "Cohort":
        """The same candidates, of whom those with one of these scans took part."""
        drawn = {self.patients[row] for row in rows}
        return replace(self, took_part=tuple(name in drawn for name in self.patients))

    def rows(self, person: str) -> list[int]:
        """The scans of a patient."""
        return [row for row, name in enumerate(self.patients) if name == person]

    def per_person(self, of_scans: Float[Tensor, "n d"]) -> Float[Tensor, "p d"]:
        """The average over each patient's scans."""
        return torch.stack([of_scans[self.rows(person)].double().mean(0) for person in self.people])

    def group(self, attribute: str) -> np.ndarray:
        """Subgroup of each of `people`; empty text where it is not known."""
        of_scans = self.groups.get(attribute, ("",) * len(self.patients))
        known = dict(zip(self.patients, of_scans, strict=True))
        return np.array([known[name] for name in self.people])
