"""Paths from noise to latents: what a noisy sample is at each time, and the velocity that the model learns.

Time runs from 0 (noise) to 1 (latents). A sample on the path is a(t) data + b(t) noise, its velocity
a'(t) data + b'(t) noise; sampling follows the velocity from 0 to 1. Everything is in the standardised space.
What this file does not do: weigh losses, draw times, or step (`training.py`, `sampling.py`).

`linear`: a = t, b = 1 - t, velocity = data - noise (SiT, arXiv:2401.08740; rectified flow, arXiv:2209.03003).
`variance_preserving`: DDPM's linear schedule in continuous time (arXiv:2011.13456), beta from 0.1 to 20, at
the schedule's time (1 - t)^2: with 1 - t the velocity is infinite at the data, with the square it is finite.

Axes: b = samples, c d h w = latents.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

PathName = Literal["linear", "variance_preserving"]
BETA_FIRST, BETA_LAST = 0.1, 20.0
"""Noise rate of the variance-preserving schedule at the data and at the noise."""
_NEAREST = 1e-4  # to the data, where the rate of the noise is 0 / 0


@dataclass(frozen=True)
class _Coefficients:
    data: Tensor
    noise: Tensor
    data_rate: Tensor
    noise_rate: Tensor


@dataclass(frozen=True)
class Path:
    """One of the two paths."""

    name: PathName

    def noisy(
        self,
        data: Float[Tensor, "b c d h w"],
        noise: Float[Tensor, "b c d h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c d h w"]:
        """The sample at `time` between noise and data."""
        at = self._at(time)
        return at.data * data + at.noise * noise

    def velocity(
        self,
        data: Float[Tensor, "b c d h w"],
        noise: Float[Tensor, "b c d h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c d h w"]:
        """The rate of change of that sample with time: what the model is asked for."""
        at = self._at(time)
        return at.data_rate * data + at.noise_rate * noise

    def noise_in(
        self,
        sample: Float[Tensor, "b c d h w"],
        velocity: Float[Tensor, "b c d h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c d h w"]:
        """The noise of a sample at `time`, from its velocity."""
        at = self._at(time)
        return (at.data * velocity - at.data_rate * sample) / (
            at.data * at.noise_rate - at.data_rate * at.noise
        )

    def _at(self, time: Tensor) -> _Coefficients:
        t = time.reshape(-1, 1, 1, 1, 1)
        if self.name == "linear":
            return _Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
        u = (1 - t).clamp(min=_NEAREST)
        log_data = -0.25 * u**4 * (BETA_LAST - BETA_FIRST) - 0.5 * u**2 * BETA_FIRST
        data, noise = log_data.exp(), (-torch.expm1(2 * log_data)).sqrt()
        data_rate = data * (u**3 * (BETA_LAST - BETA_FIRST) + u * BETA_FIRST)
        return _Coefficients(data, noise, data_rate, -data * data_rate / noise)
