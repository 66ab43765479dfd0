"""A hospital of toy patients that answered real questions: what left it, its books, and who was in.

The answers, the gate, the ledger and the journal are the product's; only scans are made up.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit.cohort import Cohort
from audit.evidence import Evidence, Release, SiteBooks
from client.exchanges import erasure, probes, survey
from client.training.site_state import StateFolder
from federation.exchanges.erasure import ErasureAsk
from federation.exchanges.probes import ProbeAsk
from federation.exchanges.survey import SurveyAsk
from federation.plan.plan import ProbePlan, RunPlan, TrainingPlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from tests.worlds import GRID, Hospital, ViewedScans, coded_network, small_network, small_plan

AGES = (20.0, 90.0)


def toy_plan(code_size: int = 24, **changes: Any) -> RunPlan:
    """A plan with a survey, probes of a measured value and an erasure, of seconds."""
    return small_plan(
        sites=("north", "south", "west"),
        network=small_network(code_size=code_size),
        probes=ProbePlan(every_rounds=1, folds=3, anatomy={"age": AGES}),
        training=TrainingPlan(rounds=1, steps_per_round=1, batch_size=4),
        **changes,
    )


class Answered:
    """A hospital `north` with so many patients in and out, in a folder of its own."""

    def __init__(
        self, folder: Path, n_in: int, n_out: int, plan: RunPlan, exact_sums: bool = True, seed: int = 0
    ) -> None:
        self.plan = plan
        people = [f"p{n}" for n in range(n_in + n_out)]
        self.scans = ViewedScans.of(people, seed=seed)
        self.scans.train = list(range(n_in))
        ages = torch.linspace(AGES[0] + 5, AGES[1] - 5, len(people)).tolist()
        self.scans.covariates = [{"age": age} for age in ages]
        self.site = Hospital(folder / "north", self.scans, exact_sums=exact_sums)
        self.releases: list[Release] = []
        StateFolder(self.site.state_dir / "state", plan.sha256).enter(1, lambda: _parts(plan, home_keys))

    def ask(self, *kinds: str) -> "Answered":
        """Answer the questions of these kinds."""
        keys = shared_keys(_network(self.plan), self.plan.style.head, self.plan.aggregation.method)
        state, text = _network(self.plan).state_dict(), self.plan.to_json()
        shared = {name: state[name] for name in keys}
        for kind in kinds:
            match kind:
                case "survey":
                    left = survey.ANSWER.once(self.site, SurveyAsk(plan_json=text), self.plan)
                case "erasure":
                    ask = ErasureAsk(plan_json=text, shared=shared)
                    left = erasure.ANSWER.once(self.site, ask, self.plan)
                case _:
                    probe = ProbeAsk(plan_json=text, round=1, shared=shared, bank={}, probe={})
                    left = probes.ANSWER.once(self.site, probe, self.plan)
            self.releases.append(Release("north", dict(left.record), dict(left.tensors)))
        return self

    @property
    def cohort(self) -> Cohort:
        """The candidates."""
        n, n_in = len(self.scans.patients), len(self.scans.train)
        low, high = AGES
        ages = [float(known["age"]) for known in self.scans.covariates]
        measured = torch.tensor([[2 * (age - low) / (high - low) - 1] for age in ages])
        took_part = tuple(row < n_in for row in range(n))
        return Cohort("north", self.scans.values[:, 0], tuple(self.scans.patients), took_part, measured)

    def evidence(self, **changes: Any) -> Evidence:
        """All of it."""
        network = _network(self.plan)
        state = self.site.state_dir
        whole = Evidence(
            name="toy",
            plan=self.plan,
            books={"north": SiteBooks(state / "journal.jsonl", state / "ledger.jsonl")},
            releases=self.releases,
            cohorts={"north": self.cohort},
            hashes={},
            network_of=lambda release: network,
        )
        return replace(whole, **changes)


_NETWORKS: dict[Any, MeDUET] = {}


def _network(plan: RunPlan) -> MeDUET:
    """The network of a plan with its code; plans that differ in their name have the same."""
    if plan.network not in _NETWORKS:
        _NETWORKS[plan.network] = coded_network(plan)
    return _NETWORKS[plan.network]


def _parts(plan: RunPlan, keys: Any) -> dict[str, Tensor]:
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    named = model.state_dict()
    return {n: named[n] for n in keys(model, plan.style.head, plan.aggregation.method)}


def gaussian(count: int, numbers: int, seed: int) -> Tensor:
    """Vectors of people who are alike in nothing."""
    return torch.randn(count, numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(count: int, seed: int) -> Tensor:
    """Latents of as many."""
    return torch.randn(count, 2, *GRID, generator=torch.Generator().manual_seed(seed))


def membership(n_in: int, n_out: int) -> np.ndarray:
    """Who is in: the first ones."""
    return np.arange(n_in + n_out) < n_in
