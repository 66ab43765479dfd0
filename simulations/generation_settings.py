"""How much of a generative model is sampled and measured: the defaults suit a run, smaller numbers a demo."""

from dataclasses import dataclass, field

from meduet_models.diffusion.conditions import Condition
from meduet_models.diffusion.sampling import Solver
from simulations.generation.use import UseSettings


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How much is sampled and measured."""

    samples: int = 24
    """Samples of each kind (told content and style, one of them, nothing)."""
    steps: int = 25
    """Solver steps of every sample but those of the comparison over steps."""
    solver: Solver = "heun"
    """Solver of all samples."""
    guidance: dict[Condition, float] = field(default_factory=dict)
    """Weight of each condition's guidance, where it is told; 1, or left out: none."""
    step_counts: tuple[int, ...] = (2, 5, 10, 25, 50, 250)
    """Solver steps that are compared; the last is what the others are held against."""
    step_samples: int = 12
    """Samples at each of them."""
    most_real: int = 64
    """Real scans of each side, at most."""
    resamples: int = 100
    """Bootstrap resamples behind each interval."""
    neighbours: int = 3
    """Neighbours that make a neighbourhood, for precision, recall, density and coverage."""
    seeds: int = 3
    """Seeds side by side in the gallery."""
    patients: int = 3
    """Patients in the grid of contents and styles."""
    volumes: int = 2
    """Volumes of each kind that are written as NIfTI and shown in the viewer."""
    use: UseSettings | None = field(default_factory=UseSettings)
    """The segmenters that learn from synthetic scans; none: they are left out."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if list(self.step_counts) != sorted(set(self.step_counts)) or len(self.step_counts) < 2:
            raise ValueError(f"Expected rising step_counts, two or more; got {self.step_counts}.")
        least = {"samples": self.neighbours + 1, "step_samples": 4, "most_real": 4, "resamples": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"Expected {name} of at least {bound}; got {getattr(self, name)}.")
