"""Draws of the diffusion model: a generator for each purpose, from a stable hash, and the choices of a step.

What it does not do: apply them (`training.py`, `sampling.py`). The same key gives the same numbers on every
machine, in any order of calls.

Axes: b = samples.
Source of stratified times: variational diffusion models (arXiv:2107.00630).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meduet_models import seeds
from meduet_models.diffusion.conditions import Condition
from meduet_models.diffusion.settings import DiffusionTraining


def generator_of(purpose: str, *key: int) -> torch.Generator:
    """A CPU generator for this purpose and these numbers (seed, step, sample, ...)."""
    return seeds.generator_of("fedmeduet diffusion", purpose, *key)


@dataclass(frozen=True)
class StepDraw:
    """Every choice of a step; applied twice, it gives the same step."""

    rows: Int[Tensor, " b"]
    """Which examples."""
    time: Float[Tensor, " b"]
    """Where between noise and data."""
    noise_seed: int
    """Of the noise, whose shape is that of the latents."""
    as_site: Bool[Tensor, " b"]
    """Who is told the style of its site."""
    dropped: dict[Condition, Bool[Tensor, " b"]]
    """Who is not told what."""
    restyled: Bool[Tensor, " b"]
    """Whose content is told from the scan in another site's style."""
    content_target: Float[Tensor, " b"]
    """To which site, as a place in [0, 1) among those with a style."""
    moved: Bool[Tensor, " b"]
    """Who is learned as restyled to another site."""
    scan_target: Float[Tensor, " b"]
    """To which site, likewise."""


def draw_step(
    settings: DiffusionTraining, names: Sequence[Condition], available: int, seed: int, step: int
) -> StepDraw:
    """Draw a step from `available` examples: distinct ones, where there are enough.

    Times are stratified over the batch: one in each of its equal shares of the distribution. Raises
    `ValueError` when there is nothing to draw from.
    """
    if available < 1:
        raise ValueError("Expected at least one example to train the diffusion model on; got none.")
    generator, size = generator_of("step", seed, step), settings.batch_size
    row_seed, noise_seed = (int(n) for n in torch.randint(2**62, (2,), generator=generator))
    rows = np.random.default_rng(row_seed).choice(available, size, replace=size > available)
    time = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    if settings.times == "logit_normal":
        time = torch.special.ndtri(time).sigmoid()
    as_site = torch.rand(size, generator=generator) < settings.site_style
    dropped = {name: torch.rand(size, generator=generator) < settings.drop for name in names}
    restyled = torch.rand(size, generator=generator) < settings.restyled_content
    content_target = torch.rand(size, generator=generator)
    moved = torch.rand(size, generator=generator) < settings.restyled_scans
    scan_target = torch.rand(size, generator=generator)
    return StepDraw(
        torch.from_numpy(rows),
        time,
        noise_seed,
        as_site,
        dropped,
        restyled,
        content_target,
        moved,
        scan_target,
    )
