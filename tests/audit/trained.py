"""A network that really learned some patients: the product's own steps, on toy latents."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from audit.cohort import Cohort
from audit.evidence import Evidence, Release
from client.latents.batches import Batches
from client.training.pretraining import train_round
from client.training.site_state import SiteState
from client.training.trainee import Trainee
from federation.plan.plan import RunPlan, StylePlan, TrainingPlan
from meduet_models.meduet import MeDUET
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.sharing import home_keys, shared_keys
from tests.worlds import ViewedScans, small_network, small_plan

WEIGHTS = LossWeights(mftd=0.0, siqc=0.0, invariance=0.0, restyled_reconstruction=0.0)


def training_plan(steps: int, **objective: object) -> RunPlan:
    """One round of so many steps."""
    return small_plan(
        sites=("north", "south", "west"),
        network=small_network(width=24, depth=2, decoder_width=24),
        objective=ObjectiveConfig(weights=WEIGHTS, **objective),  # type: ignore[arg-type]
        training=TrainingPlan(rounds=1, steps_per_round=steps, batch_size=8, learning_rate=3e-3),
        style=StylePlan(exchange="none", minimum_cohort=2),
    )


def start(plan: RunPlan, latents: Tensor) -> MeDUET:
    """The common start, on the scale of these latents."""
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    network.set_latent_scale(latents.mean(0), latents.std((0, 2, 3, 4)))
    return network.eval().requires_grad_(False)


def after_round(plan: RunPlan, before: MeDUET, latents: Tensor) -> MeDUET:
    """The network after a site with these training scans trained a round from `before`."""
    weights = before.state_dict()
    shared = {n: weights[n] for n in shared_keys(before, plan.style.head, plan.aggregation.method)}
    home = {n: weights[n] for n in home_keys(before, plan.style.head, plan.aggregation.method)}
    people = [f"p{n}" for n in range(len(latents))]
    scans = replace(ViewedScans.of(people), values=latents[:, None])
    trainee = Trainee.of(plan, shared, SiteState(round=0, home=home), torch.device("cpu"))
    result = train_round(trainee, Batches(scans, plan, None), plan, 1, b"1" * 32, home)
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    network.load_state_dict(weights | {n: t + result.update[n] for n, t in shared.items()})
    return network.eval().requires_grad_(False)


def cohort_of(latents: Tensor, n_in: int) -> Cohort:
    """Candidates of whom the first ones took part."""
    people = tuple(f"p{n}" for n in range(len(latents)))
    return Cohort("north", latents, people, tuple(bool(took) for took in np.arange(len(latents)) < n_in))


def evidence_of_round(
    plan: RunPlan, before: MeDUET, after: MeDUET, cohort: Cohort, **record: object
) -> Evidence:
    """What whoever sees one site's update looks at."""
    return Evidence(
        name="toy",
        plan=plan,
        books={},
        releases=[Release("north", {"kind": "round", "round": 1, **record}, {})],
        cohorts={"north": cohort},
        hashes={},
        before_after=lambda release: (before, after),
        model=after,
        earlier={"the common start": before},
    )
