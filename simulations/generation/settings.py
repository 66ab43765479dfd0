"""How much of a generative model is sampled and measured: the defaults suit a run, smaller numbers a demo."""

from dataclasses import dataclass, field
from typing import Annotated

from forms.form import check
from forms.ranges import Entries, Range
from meduet_models.diffusion.conditions import Condition
from meduet_models.diffusion.sampling import Solver

Steps = Annotated[int, Range(at_least=1, at_most=10_000)]
FOLDER = "generation"
"""Below a run's folder: what was sampled and measured."""
ALL = "all"
"""In place of a site's name, in what was measured over all pairs of sites."""
Guidance = Annotated[float, Range(at_least=0, at_most=1000)]


@dataclass(frozen=True, kw_only=True)
class UseSettings:
    """How the segmenters are trained and measured."""

    patients: int = 4
    """Patients whose labels are used."""
    copies: int = 2
    """Synthetic scans of each labelled scan, each in another site's style."""
    steps: int = 100
    """Optimiser steps of each segmenter."""
    batch_size: int = 4
    """Patients per step, at most."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seeds: int = 2
    """Repetitions, each with other labelled patients and another start."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How much is sampled and measured."""

    samples: Annotated[int, Range(at_least=2, at_most=100_000)] = 24
    """Samples of each kind (told content and style, one of them, nothing)."""
    steps: Steps = 25
    """Solver steps of every sample but those of the comparison over steps."""
    solver: Solver = "heun"
    """Solver of all samples."""
    guidance: Annotated[dict[Condition, Guidance], Entries(8)] = field(default_factory=dict)
    """Weight of each condition's guidance, where it is told; 1, or left out: none."""
    step_counts: Annotated[tuple[Steps, ...], Entries(64)] = (2, 5, 10, 25, 50, 250)
    """Solver steps that are compared; the last is what the others are held against."""
    step_samples: Annotated[int, Range(at_least=4, at_most=100_000)] = 12
    """Samples at each of them."""
    most_real: Annotated[int, Range(at_least=4, at_most=1_000_000)] = 64
    """Real scans of each side, at most."""
    resamples: Annotated[int, Range(at_least=2, at_most=1_000_000)] = 100
    """Bootstrap resamples behind each interval."""
    neighbours: Annotated[int, Range(at_least=1, at_most=1_000)] = 3
    """Neighbours that make a neighbourhood, for precision, recall, density and coverage."""
    seeds: Annotated[int, Range(at_least=1, at_most=1_000)] = 3
    """Seeds side by side in the gallery."""
    patients: Annotated[int, Range(at_least=1, at_most=1_000)] = 3
    """Patients in the grid of contents and styles."""
    volumes: Annotated[int, Range(at_least=0, at_most=1_000)] = 2
    """Volumes of each kind that are written as NIfTI and shown in the viewer."""
    use: UseSettings | None = field(default_factory=UseSettings)
    """The segmenters that learn from synthetic scans; none: they are left out."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(self, "generation")
        if list(self.step_counts) != sorted(set(self.step_counts)) or len(self.step_counts) < 2:
            raise ValueError(f"Expected rising step_counts, two or more; got {self.step_counts}.")
        if self.samples <= self.neighbours:
            raise ValueError(
                f"Expected generation.samples above generation.neighbours; got {self.samples} and "
                f"{self.neighbours}."
            )
