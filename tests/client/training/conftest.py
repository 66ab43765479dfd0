"""Rounds of three steps at a site of which nothing stays but the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federation.exchanges.pretraining import TrainAsk
from federation.plan.plan import RunPlan, TrainingPlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from tests.client.training.killed_site import PATIENTS, STEPS, Tensors, ToySite


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return toy_plan(training=TrainingPlan(rounds=3, steps_per_round=STEPS, batch_size=4, proximal=0.1))


@pytest.fixture
def site(tmp_path: Path, toy_scans: Any) -> Callable[..., ToySite]:
    def make(folder: str = "a", patients: list[str] = PATIENTS, **settings: Any) -> ToySite:
        return ToySite(tmp_path / folder, toy_scans(patients), **settings)

    return make


@pytest.fixture
def ask(toy_bank: Any) -> Callable[..., TrainAsk]:
    def make(
        plan: RunPlan, round_number: int = 1, shared: Tensors | None = None, present: Any = None
    ) -> TrainAsk:
        model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
        named, method = model.state_dict(), plan.aggregation.method
        return TrainAsk(
            plan_json=plan.to_json(),
            round=round_number,
            shared=shared or {n: named[n] for n in shared_keys(model, plan.style.head, method)},
            bank={} if plan.style.exchange == "none" else toy_bank(plan, present).to_tensors(),
            home={n: named[n] for n in home_keys(model, plan.style.head, method)}
            if round_number == 1
            else None,
        )

    return make
