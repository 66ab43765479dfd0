"""Toy plans of the policies with noise, and a bank of styles for them."""

import dataclasses
from typing import Any

import torch

from federation.exchanges.survey import survey_layout
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.latent_privacy import AggregatePlan, SyntheticPlan
from federation.plan.plan import RunPlan, TrainingPlan
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.style.bank import StyleBank
from meduet_models.style.code import entry_of, vector_of
from meduet_models.style.restyling import own_entries
from tests.worlds import RECIPIENT, protected_plan, public_latents, small_plan

PUBLIC = public_latents()
SYNTHETIC = SyntheticPlan(
    epsilon_style=2.0,
    samples=6,
    transformer=TransformerShape(patch_size=2, width=6, depth=1, heads=1),
    public_steps=2,
    steps=3,
    sampling_rate=0.3,
    clip_norm=0.5,
    expected_patients=40,
    draws=2,
    sampling_steps=2,
    although_noise_wins=True,
)
AGGREGATE = AggregatePlan(epsilon_style=2.0, dimensions=3, samples=7)


def the_plan(policy: str, **changes: Any) -> RunPlan:
    """A plan of seconds with a diffusion model of this policy; `changes` replace its settings."""
    settings: dict[str, Any] = {
        "synthetic": {"synthetic": SYNTHETIC, "recipient": RECIPIENT},
        "aggregate": {"aggregate": AGGREGATE},
    }[policy]
    diffusion = DiffusionPlan(
        policy=policy,
        transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
        training=DiffusionTraining(batch_size=4),
        final_steps=3,
        **settings | changes,
    )
    training = TrainingPlan(rounds=2, steps_per_round=1, batch_size=4, warmup=0.0)

    def make(**parts: Any) -> RunPlan:
        return small_plan(**parts, training=training, diffusion=diffusion)

    plan = protected_plan(PUBLIC, make, epsilon=8.0)
    return dataclasses.replace(plan, aggregation=dataclasses.replace(plan.aggregation, deadline_s=300.0))


def bank_of_styles(plan: RunPlan, shift: float = 0.0) -> StyleBank:
    """Styles of the plan's sites, 40 patients each, about that of the public scans."""
    layout = survey_layout(plan)
    own = own_entries(PUBLIC, layout)
    vectors = torch.stack([vector_of(own.each(lambda t, n=n: t[n])) for n in range(len(PUBLIC))]).mean(0)
    entries = {
        site: (40.0, entry_of(vectors + 0.05 * (n + shift), layout)) for n, site in enumerate(plan.sites)
    }
    return StyleBank.of_entries(plan.sites, entries, layout)
