"""Where models at home begin: the network of `diffusion.synthetic`, trained at the centre on public scans.

On phantoms in the common style of the protected bank, into which every site takes its patients: what a site
then learns with noise is only how its patients differ from phantoms. All of it follows from the plan, the
public scans and the bank, so it costs no patient anything, and a run that is resumed sends the same.

What this file does not do: ask a site (`server/exchanges/synthetic_latents.py`).

Axes: m = public scans, c d h w = latents.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from federation.exchanges.survey import survey_layout
from federation.exchanges.synthetic_latents import home_transformer, synthetic_of
from federation.plan.plan import RunPlan
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.conditions import UNKNOWN, Examples
from meduet_models.diffusion.training import DiffusionTrainee
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.style.common_style import CommonStyle

_SMALLEST = 1e-3


class _Public:
    """Public latents as a source."""

    def __init__(self, latents: Float[Tensor, "m c d h w"]) -> None:
        self._latents = latents

    def __len__(self) -> int:
        """How many."""
        return len(self._latents)

    def read(self, rows: Int[Tensor, " b"]) -> Examples:
        """These of them, of which nothing is known."""
        unknown = torch.full((len(rows),), UNKNOWN)
        return Examples(
            latents=self._latents[rows],
            site=torch.zeros_like(unknown),
            body_part=unknown,
            spacing=torch.full((len(rows), 3), torch.nan),
            category=unknown,
        )


def home_start(
    plan: RunPlan,
    public: Float[Tensor, "m c d h w"],
    common: CommonStyle,
    conditioner: Conditioner,
) -> DiffusionTransformer:
    """The network at home after its public steps; it is told nothing, so `conditioner` tells it nothing."""
    assert plan.diffusion is not None, "there are models at home"
    dressed = common.dressed(public, survey_layout(plan))
    mean = dressed.mean(0)
    transformer = home_transformer(plan)
    deviation = (dressed - mean).square().mean((0, 2, 3, 4)).sqrt()
    transformer.set_latent_scale(mean, deviation.clamp(min=_SMALLEST))
    settings = dataclasses.replace(
        plan.diffusion.training,
        site_style=0.0,
        restyled_content=0.0,
        restyled_scans=0.0,
        alignment=0.0,
        start="scratch",
        checkpoint_blocks=False,
    )
    steps = synthetic_of(plan).public_steps
    trainee = DiffusionTrainee(
        transformer.to(conditioner.device),
        conditioner,
        settings,
        total_steps=max(1, steps),
        seed=plan.seed,
        style_bank=None,
    )
    source = _Public(dressed)
    for step in range(steps):
        trainee.step(source, step)
    return trainee.ema.cpu()
