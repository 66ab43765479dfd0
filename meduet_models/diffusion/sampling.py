"""Sampling: from noise to latents along the learned velocity, and back.

Euler and Heun on an even grid of times in [0, 1]: MONAI's rectified-flow scheduler takes steps whose lengths
do not sum to 1, so we step ourselves. Guidance is composed, one weight per condition, over all channels:
v = v() + sum over i of w_i (v(1..i) - v(1..i-1)), conditions in the order of `CONDITIONS`; terms that cancel
are not computed, so weights of 1 cost nothing and give the plain conditional velocity.

What this file does not do: decode latents, or choose what is told (`conditioner.py`).

Axes: b = samples, c d h w = latents.
Source: guidance arXiv:2207.12598, composed arXiv:2206.01714; SiT arXiv:2401.08740.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.diffusion.conditions import Condition, Conditions
from meduet_models.diffusion.draws import generator_of
from meduet_models.diffusion.transformer import DiffusionTransformer

Solver = Literal["euler", "heun"]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""Sample (b c d h w) and time (b) to velocity."""
OnStep = Callable[[int, int], None]
"""Told after each step how many are done, of how many."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How latents are sampled."""

    steps: int = 25
    """Solver steps."""
    solver: Solver = "heun"
    """`euler`: one velocity per step, error of order 1. `heun`: two, order 2."""
    guidance: dict[Condition, float] = field(default_factory=dict)
    """Weight of each condition's guidance; 1, or left out: the plain conditional model."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.steps < 1:
            raise ValueError(f"Expected at least one sampling step; got {self.steps}.")


def _quiet(done: int, total: int) -> None:
    """Tell nobody."""


@torch.no_grad()
def sample(
    transformer: DiffusionTransformer,
    conditions: Conditions,
    count: int,
    settings: SamplingSettings,
    *,
    seed: int,
    batch_size: int = 16,
    on_step: OnStep = _quiet,
    noise: Float[Tensor, "b c d h w"] | None = None,
) -> Float[Tensor, "b c d h w"]:
    """Sample `count` raw latents, float32 on the CPU.

    `conditions` hold `count` rows, or one that is told to all. Sample i starts from noise that depends on
    `seed` and i alone, whatever the batch size; or from `noise[i]`. Raises `ValueError` when the number of
    rows is another, or guidance is asked of a condition that is not told.
    """
    given = _rows(conditions, count)
    if noise is not None and len(noise) != count:
        raise ValueError(f"Expected noise for {count} samples; got {len(noise)}.")
    config, device = transformer.config, transformer.latent_mean.device
    shape = (config.latent_channels, *config.latent_grid)
    chunks = torch.split(torch.arange(count), batch_size)
    times = torch.linspace(0.0, 1.0, settings.steps + 1, dtype=torch.float64)
    latents = []
    for number, rows in enumerate(chunks):
        if noise is not None:
            start = noise[rows].to(device)
        else:
            start = torch.stack([_noise(seed, int(row), shape) for row in rows]).to(device)
        velocity = guided_velocity(transformer, given(rows, device), settings.guidance)
        ended = integrate(
            velocity, start, times, settings.solver, _progress(on_step, number, len(chunks), settings.steps)
        )
        latents.append(transformer.to_latents(ended).cpu())
    return torch.cat(latents)


@torch.no_grad()
def invert(
    transformer: DiffusionTransformer,
    latents: Float[Tensor, "b c d h w"],
    conditions: Conditions,
    settings: SamplingSettings,
    on_step: OnStep = _quiet,
    *,
    batch_size: int = 16,
) -> Float[Tensor, "b c d h w"]:
    """The noise from which `sample`, told the same, comes back to these raw latents: the same equation from
    time 1 to 0. On the CPU. Told another style on the way back, it keeps what style does not explain.

    Raises `ValueError` as `sample` does.
    """
    given, device = _rows(conditions, len(latents)), transformer.latent_mean.device
    chunks = torch.split(torch.arange(len(latents)), batch_size)
    times = torch.linspace(1.0, 0.0, settings.steps + 1, dtype=torch.float64)
    noise = []
    for number, rows in enumerate(chunks):
        start = transformer.standardise(latents[rows].to(device))
        velocity = guided_velocity(transformer, given(rows, device), settings.guidance)
        ended = integrate(
            velocity, start, times, settings.solver, _progress(on_step, number, len(chunks), settings.steps)
        )
        noise.append(ended.cpu())
    return torch.cat(noise)


def integrate(
    velocity: Velocity,
    start: Float[Tensor, "b c d h w"],
    times: Float[Tensor, " steps"],
    solver: Solver,
    on_step: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "b c d h w"]:
    """Follow a velocity through these times, forwards or backwards."""
    x = start
    for step, (now, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True), start=1):
        rate = velocity(x, _time(now, x))
        if solver == "heun":
            rate = (rate + velocity(x + (then - now) * rate, _time(then, x))) / 2
        x = x + (then - now) * rate
        on_step(step)
    return x


def guided_velocity(
    transformer: DiffusionTransformer, conditions: Conditions, guidance: dict[Condition, float]
) -> Velocity:
    """The velocity under composed guidance, with as few evaluations of the transformer as its weights need.

    Raises `ValueError` when a condition is weighed that is not told.
    """
    names = [name for name in transformer.config.sizes.names if getattr(conditions, name) is not None]
    for name, weight in guidance.items():
        if weight != 1 and name not in names:
            raise ValueError(
                f"Guidance by {name} has no effect: the conditions told are {', '.join(names) or 'none'}."
            )
    weights = [1.0, *(guidance.get(name, 1.0) for name in names), 0.0]
    terms = [
        (weights[i] - weights[i + 1], conditions.only(*names[:i]))  # v(1..i) has w_i and -w_(i+1)
        for i in range(len(names) + 1)
        if weights[i] != weights[i + 1]
    ]

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for weight, partly in terms:
            total = total + weight * transformer(x, time, partly)
        return total

    return velocity


def _rows(conditions: Conditions, count: int) -> Callable[[Tensor, torch.device], Conditions]:
    """A batch of the conditions, of which there are `count`, or one that is told to all."""
    sizes: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        sizes.add(len(tensor))
        return tensor

    conditions.each(note)
    if sizes - {count} and sizes != {1}:
        raise ValueError(
            f"Expected conditions for each of {count} samples, or one set for all; got {sorted(sizes)} rows."
        )
    single = sizes == {1}

    def batch(rows: Tensor, device: torch.device) -> Conditions:
        places = torch.zeros_like(rows) if single else rows
        return conditions.each(lambda tensor: tensor[places.to(tensor.device)].to(device))

    return batch


def _noise(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator_of("sample", seed, number))


def _time(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, dtype=torch.float32, device=like.device)


def _progress(on_step: OnStep, chunk: int, chunks: int, steps: int) -> Callable[[int], None]:
    return lambda done: on_step(chunk * steps + done, chunks * steps)
