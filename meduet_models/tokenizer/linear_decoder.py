"""The best linear decoder of a patch from its own latent and its 26 neighbours, in closed form, from sums.

Patches cut side by side leave seams where each is decoded from its own latent alone; the neighbours tell much
of what a few numbers could not hold. Sums of outer products are enough to fit it, so the sums of two sets of
volumes give what their union gives. What it does not do: encode, or learn by steps (`patch_vae.py` starts
from it).

Axes: b = volumes, p = voxels of a patch (64), c = latent channels, n = 27 c + 1 (the neighbourhood's latents,
and 1), d h w = patches.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 27
"""Latents a patch is decoded from; beyond the volume they are 0, as a convolution pads."""


@dataclass(frozen=True, eq=False)
class NeighbourMoments:
    """Second moments of neighbourhoods, and of neighbourhoods with patches, in float64."""

    products: Float[Tensor, "n n"]
    """Sum of outer products of neighbourhoods; the last entry counts the patches."""
    patches: Float[Tensor, "n p"]
    """Sum of outer products of neighbourhoods with their middle patches."""

    @staticmethod
    def of(latents: Float[Tensor, "b c d h w"], patches: Float[Tensor, "b p d h w"]) -> "NeighbourMoments":
        """Moments of every position of these latents, and of the patches to be decoded there."""
        padded = functional.pad(latents.double(), (1,) * 6)
        around = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # b c d h w 3 3 3
        seen = around.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)  # b·d·h·w, 27 c
        seen = functional.pad(seen, (0, 1), value=1.0)
        return NeighbourMoments(seen.T @ seen, seen.T @ patches.double().movedim(1, -1).flatten(0, 3))

    def __add__(self, other: "NeighbourMoments") -> "NeighbourMoments":
        """Moments of the union."""
        return NeighbourMoments(self.products + other.products, self.patches + other.patches)


def best_decoder(
    moments: NeighbourMoments, deviation: float
) -> tuple[Float[Tensor, "p c 3 3 3"], Float[Tensor, " p"]]:
    """Kernel and bias that decode patches with the least squared error, when every latent is read with noise
    of this `deviation` (above 0: it is what makes the solution unique)."""
    noise = torch.full((len(moments.products),), float(moments.products[-1, -1]) * deviation**2)
    noise[-1] = 0.0  # of the constant
    weights = torch.linalg.solve(moments.products + torch.diag(noise.double()), moments.patches)  # n p
    kernel = weights[:-1].T.unflatten(1, (-1, 3, 3, 3))
    return kernel, weights[-1]
