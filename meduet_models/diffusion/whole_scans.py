"""Whole scans through a diffusion transformer that knows one grid: one trajectory of the whole scan, whose
velocity at each step is that of overlapping windows, blended.

Neighbours agree at every step, not only in the end: windows that are sampled one by one and blended
afterwards would show two different anatomies in each other. Each window is told its own content.

What this file does not do: encode, decode, or choose what is told (`harmonisation.py`).

Axes: n = windows, c = channels, d h w = latents of the whole scan, p q r = those of a window.
Source: MultiDiffusion (arXiv:2302.08113).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.diffusion.conditions import Conditions
from meduet_models.diffusion.draws import generator_of
from meduet_models.diffusion.sampling import SamplingSettings, Velocity, guided_velocity, integrate
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.windows import Windows


@torch.no_grad()
def sample_whole(
    transformer: DiffusionTransformer,
    conditions: Conditions,
    windows: Windows,
    settings: SamplingSettings,
    *,
    seed: int,
    noise: Float[Tensor, "c d h w"] | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "c d h w"]:
    """Raw latents of a whole scan, float32 on the CPU; `conditions` hold a row for each window.

    From noise that depends on `seed` and the scan's size alone, or from `noise`.
    """
    device = transformer.latent_mean.device
    shape = (transformer.config.latent_channels, *windows.sides)
    if noise is None:
        noise = torch.randn(shape, generator=generator_of("sample whole", seed, *windows.sides))
    times = torch.linspace(0.0, 1.0, settings.steps + 1, dtype=torch.float64)
    velocity = _velocity(transformer, conditions, windows, settings)
    ended = integrate(velocity, noise[None].to(device), times, settings.solver, on_step)[0]
    centre, deviation = _scale(transformer)
    return (ended * deviation + centre).cpu()


@torch.no_grad()
def invert_whole(
    transformer: DiffusionTransformer,
    latents: Float[Tensor, "c d h w"],
    conditions: Conditions,
    windows: Windows,
    settings: SamplingSettings,
    on_step: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "c d h w"]:
    """The noise from which `sample_whole`, told the same, comes back to these raw latents; on the CPU."""
    centre, deviation = _scale(transformer)
    times = torch.linspace(1.0, 0.0, settings.steps + 1, dtype=torch.float64)
    velocity = _velocity(transformer, conditions, windows, settings)
    start = (latents.to(centre.device) - centre) / deviation
    return integrate(velocity, start[None], times, settings.solver, on_step)[0].cpu()


def _scale(transformer: DiffusionTransformer) -> tuple[Tensor, Tensor]:
    """Centre and deviation of each channel. Raises `ValueError` when the centre differs from place to place:
    such a model knows one place of the body for each latent voxel, and no other."""
    centre = transformer.latent_mean[:, :1, :1, :1]
    if not torch.allclose(transformer.latent_mean, centre.expand_as(transformer.latent_mean)):
        raise ValueError(
            "Expected a model of crops from anywhere in a scan; this one was trained on registered crops."
        )
    return centre, transformer.latent_deviation.reshape(-1, 1, 1, 1)


def _velocity(
    transformer: DiffusionTransformer, conditions: Conditions, windows: Windows, settings: SamplingSettings
) -> Velocity:
    assert windows.edges == transformer.config.latent_grid, "windows of the grid that it knows"

    def told(numbers: range) -> Conditions:
        return conditions.each(lambda tensor: tensor[numbers.start : numbers.stop])

    of_chunk = {
        numbers: guided_velocity(transformer, told(numbers), settings.guidance)
        for numbers in windows.chunks()
    }

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        def part(numbers: range) -> Tensor:
            return of_chunk[numbers](windows.cut(x[0], numbers), time.expand(len(numbers)))

        return windows.blend(part, x[0])[None]

    return velocity
