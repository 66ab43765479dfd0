"""A diffusion model at home: a small one, trained on a site's own patients with noise in each step (DP-SGD).

A step draws each patient by herself from the secret of the question's place in the ledger, one scan of hers,
and some times and noises at which it is seen. The mean gradient of these is hers alone, since the loss mixes
no scans; it is cut over all weights together, the cut gradients are added up and get noise, and the sum,
divided by the plan's numbers, goes to the optimiser. A step of nobody takes its noise as any other. AdamW's
moments and the moving average are functions of noisy sums. Killed, it begins again with the same draws.

Does not do: tell losses, norms or who was in a step, to anybody; keep the model: what is drawn from it leaves
(`client/exchanges/synthetic_latents.py`), and it is forgotten.
Source: DP-SGD (arXiv:1607.00133); several noises per patient: arXiv:2210.09929; gradients per sample by
Opacus (`privacy/sample_gradients.py`).

Axes: p = patients in a step, k = draws of each, c d h w = latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from client.latents.batches import TrainingScans
from client.scans.patients import rows_by_patient
from client.training.finetuning import MovingAverage
from federation.plan.latent_privacy import SyntheticPlan
from meduet_models.adamw import AdamW
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.diffusion.velocity import VelocityLoss
from privacy.group_gradients import ClippedSum, clipped_sum
from privacy.sample_gradients import per_sample_gradients
from privacy.step_secrets import StepSecrets

_AT_ONCE = 32
"""Noisy scans whose gradients are held at once, about."""


@dataclass(frozen=True)
class HomeScans:
    """A site's training scans, as the model at home sees them."""

    scans: TrainingScans
    prepared: Callable[[Float[Tensor, "1 c d h w"]], Float[Tensor, "1 c d h w"]]
    """Latents to the common style; the same map for each scan."""

    def read(self, row: int) -> Float[Tensor, "1 c d h w"]:
        """One scan."""
        return self.prepared(self.scans.latents([row]))


def train_at_home(
    transformer: DiffusionTransformer,
    home: HomeScans,
    synthetic: SyntheticPlan,
    noise: StepSecrets,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Take the plan's noisy steps, in place; at the end the network has the moving average of its weights.

    `on_step` is called after each step with its number (from 1) and NaN: its loss is nobody's to see.

    Guarantee: adding or removing one patient with all her scans changes the sum of a step by at most the
    plan's `clip_norm` in L2, before noise of the promise's deviation; she is in a step with the plan's
    chance. The weights after it are a function of these sums and of what is public. Not covered: how long a
    step took. Raises `ValueError` for a trainable weight that has no gradient per sample.
    """
    transformer.train()
    trained = dict(transformer.named_parameters())
    optimiser = AdamW([{"params": list(trained.values()), "weight_decay": 0.0}], lr=synthetic.learning_rate)
    averaged = MovingAverage(transformer, synthetic.average)
    expected = synthetic.sampling_rate * synthetic.expected_patients
    for step in range(synthetic.steps):
        summed = step_sum(transformer, home, synthetic, noise, step)
        noise.into_gradients(step, summed, trained, expected)
        optimiser.step()
        averaged.update(step)
        on_step(step + 1, math.nan)
    averaged.keep()
    transformer.eval()


def step_sum(
    transformer: DiffusionTransformer,
    home: HomeScans,
    synthetic: SyntheticPlan,
    noise: StepSecrets,
    step: int,
) -> dict[str, Tensor]:
    """The sum of the cut gradients of those who are in a step, by parameter, float64; zeros for nobody."""
    whole = ClippedSum.of_none(dict(transformer.named_parameters()))
    drawn = _drawn(home, synthetic, noise, step)
    at_once = max(1, _AT_ONCE // synthetic.draws)
    for first in range(0, len(drawn), at_once):
        gradients = _gradients(transformer, drawn[first : first + at_once])
        whole = whole + clipped_sum(gradients, synthetic.clip_norm)
    return whole.total


@dataclass(frozen=True)
class _Drawn:
    """A patient in a step: one scan of hers, and how it is seen."""

    latents: Float[Tensor, "1 c d h w"]
    noise: Float[Tensor, "k c d h w"]
    time: Float[Tensor, " k"]


def _gradients(
    transformer: DiffusionTransformer, drawn: Sequence[_Drawn]
) -> dict[str, Float[Tensor, "p ..."]]:
    """Each patient's mean gradient over her draws."""
    device, draws = transformer.latent_mean.device, len(drawn[0].time)
    latents = torch.cat([one.latents for one in drawn]).to(device)
    data = transformer.standardise(latents).repeat_interleave(draws, dim=0)
    noise = torch.cat([one.noise for one in drawn]).to(device)
    time = torch.cat([one.time for one in drawn]).to(device)
    loss = VelocityLoss()
    each = per_sample_gradients(loss, transformer, partial(loss, transformer, data, noise, time), len(data))
    return {name: t.reshape(len(drawn), draws, *t.shape[1:]).mean(1) for name, t in each.items()}


def _drawn(home: HomeScans, synthetic: SyntheticPlan, noise: StepSecrets, step: int) -> list[_Drawn]:
    """Everybody who is in the step; all that is drawn for her comes from a stream of her own."""
    found = []
    for patient, rows in rows_by_patient(home.scans.patients, home.scans.indices("train")).items():
        if (generator := noise.drawn(step, patient, synthetic.sampling_rate)) is not None:
            latents = home.read(rows[int(torch.randint(len(rows), (), generator=generator))])
            shape = (synthetic.draws, *latents.shape[1:])
            time = torch.rand(synthetic.draws, generator=generator)
            found.append(_Drawn(latents, torch.randn(shape, generator=generator), time))
    return found
