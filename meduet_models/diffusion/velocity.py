"""The loss of a diffusion model that is told nothing: each scan's own, so that its gradient is its own.

What this file does not do: draw noise and times, or take steps.

Axes: b = samples, c d h w = latents.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from meduet_models.diffusion.conditions import Conditions
from meduet_models.diffusion.path import Path
from meduet_models.diffusion.transformer import DiffusionTransformer


class VelocityLoss:
    """Mean squared error of the velocity."""

    mixes: ClassVar[bool] = False
    """A sample's loss does not depend on the other samples of its batch."""

    def __call__(
        self,
        transformer: DiffusionTransformer,
        data: Float[Tensor, "b c d h w"],
        noise: Float[Tensor, "b c d h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """Of standardised latents, with one noise and one time each; the mean over samples."""
        path = Path(transformer.config.path)
        predicted = transformer(path.noisy(data, noise, time), time, Conditions())
        return F.mse_loss(predicted, path.velocity(data, noise, time))
