"""Stand-ins for one site: random latents of a few patients, a tiny plan, a bank of three made-up styles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from federation.exchanges.survey import survey_layout
from federation.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan, VolumePlan
from meduet_models.meduet import NetworkConfig
from meduet_models.objective import LossWeights, ObjectiveConfig
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments

GRID = (4, 6, 4)


@dataclass
class ToyScans:
    """Latents in memory, with the interface of a site's latent set; remembers what was asked for."""

    patients: list[str]
    values: torch.Tensor  # n views c d h w
    site_index: torch.Tensor
    train: list[int]
    covariates: list[Mapping[str, str | float]]
    asked: list[tuple[int, int]] = field(default_factory=list)

    def indices(self, split: str) -> list[int]:
        return self.train if split == "train" else []

    def latents(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        self.asked += [(int(i), view) for i in indices]
        return self.values[list(indices), view].clone()


def make_plan(**changes: Any) -> RunPlan:
    """A plan of seconds; `changes` replace whole parts or top-level fields."""
    parts: dict[str, Any] = {
        "name": "toy",
        "seed": 7,
        "sites": ("north", "south", "west"),
        "tokenizer_sha256": "0" * 64,
        "volumes": VolumePlan(modality="mr", shape=(16, 24, 16), registered=True),
        "network": NetworkConfig(
            latent_channels=2,
            latent_grid=GRID,
            patch_size=2,
            width=16,
            depth=1,
            heads=2,
            decoder_width=12,
            decoder_depth=1,
            decoder_heads=2,
            style_map_grid=(2, 3, 2),
        ),
        "objective": ObjectiveConfig(),
        "training": TrainingPlan(rounds=3, steps_per_round=2, batch_size=4),
        "style": StylePlan(minimum_cohort=3),
        "aggregation": AggregationPlan(),
        "release": ReleasePlan(),
    }
    return RunPlan(**parts | changes)


def make_scans(patients: Sequence[str], site: int = 0, views: int = 1, seed: int = 0) -> ToyScans:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(patients), views, 2, *GRID, generator=generator) * (1 + site) + site
    rows = list(range(len(patients)))
    return ToyScans(list(patients), values, torch.full((len(rows),), site), rows, [{} for _ in rows])


def make_bank(plan: RunPlan, present: Sequence[str] | None = None) -> StyleBank:
    """The bank of sites whose latents are scaled and shifted by their number."""
    moments = {}
    for index, site in enumerate(plan.sites):
        if present is None or site in present:
            scans = make_scans([f"{site}{n}" for n in range(6)], index, seed=100 + index)
            moments[site] = StyleMoments.of(scans.values[:, 0], scans.patients, survey_layout(plan))
    return StyleBank.of(plan.sites, moments)


@pytest.fixture
def toy_plan() -> Callable[..., RunPlan]:
    return make_plan


@pytest.fixture
def toy_scans() -> Callable[..., ToyScans]:
    return make_scans


@pytest.fixture
def toy_bank() -> Callable[..., StyleBank]:
    return make_bank


@pytest.fixture
def alone_plan() -> RunPlan:
    """No bank, nothing shared."""
    return without_exchange(make_plan, "alone")


def without_exchange(plan: Callable[..., RunPlan], method: Any) -> RunPlan:
    objective = ObjectiveConfig(weights=replace(LossWeights(), invariance=0.0, restyled_reconstruction=0.0))
    style = StylePlan(minimum_cohort=3, exchange="none", head="shared", anchor=0.0)
    return plan(aggregation=AggregationPlan(method=method), style=style, objective=objective)
