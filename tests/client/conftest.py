"""Stand-ins for one site: random latents of a few patients, a tiny plan, a bank of three made-up styles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from federation.exchanges.survey import survey_layout
from federation.plan.plan import AggregationPlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from scans.volume_plan import VolumePlan
from tests.worlds import ViewedScans, small_network, small_plan


def make_plan(**changes: Any) -> RunPlan:
    """A plan of seconds; `changes` replace whole parts or top-level fields."""
    parts: dict[str, Any] = {
        "name": "toy",
        "seed": 7,
        "sites": ("north", "south", "west"),
        "volumes": VolumePlan(modality="mr", shape=(16, 24, 16), registered=True),
        "network": small_network(width=16, style_map_grid=(2, 3, 2)),
        "training": TrainingPlan(rounds=3, steps_per_round=2, batch_size=4),
        "style": StylePlan(minimum_cohort=3),
    }
    return small_plan(**parts | changes)


def make_bank(plan: RunPlan, present: Sequence[str] | None = None) -> StyleBank:
    """The bank of sites whose latents are scaled and shifted by their number."""
    moments = {}
    for index, site in enumerate(plan.sites):
        if present is None or site in present:
            scans = ViewedScans.of([f"{site}{n}" for n in range(6)], index, seed=100 + index)
            moments[site] = StyleMoments.of(scans.values[:, 0], scans.patients, survey_layout(plan))
    return StyleBank.of(plan.sites, moments)


@pytest.fixture
def toy_plan() -> Callable[..., RunPlan]:
    return make_plan


@pytest.fixture
def toy_scans() -> Callable[..., ViewedScans]:
    return ViewedScans.of


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
