"""Tokens from the volume that latents tell of: a U-Net's deepest level, beside the linear embedding.

The encoder stays a function of latents. They are decoded into a picture by a fixed linear map, fitted once on
public phantoms; what a mask hides, what partners exchange and how a scan was restyled are decided before
that, so the U-Net sees no more than the linear embedding does: not the scan at the site, whose hidden voxels
and whose own style it would see. Released, drawn and decoded latents have a picture as scans have.
The way down alone is built, as a start from public anatomy has it (`anatomy_start.py`); its cells, one per 8
voxels, are joined to tokens through a map that starts at zero.

Does not do: mask, mix or restyle (`objective/`), or read a volume (`downstream/volume_networks.py`).

Axes: b = volumes, c = latent channels, d h w = latent voxels, D H W = voxels of the picture, p = voxels of a
patch (64), n = tokens, k = encoder width.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.seeds import seed_of
from meduet_models.tokenizer.linear_decoder import NeighbourMoments, best_decoder
from meduet_models.tokenizer.patch_pca import PATCH_EDGE, PATCH_VOXELS, from_patches
from meduet_models.volume_unet import REDUCTION, WIDTHS, VolumeLevels, start_weights

LATENTS_PER_CELL = REDUCTION // PATCH_EDGE
"""Latent voxels per edge of a cell of the deepest level."""
_LATENT_NOISE = 0.03  # of every latent, when the picture is fitted: the tokenizer's own
_PER_CUBE = 2 * WIDTHS[0] + 2 * WIDTHS[1] / 8 + 3 * WIDTHS[2] / 64
"""Numbers that the levels hand on for each cube of the stem."""


class VolumeEmbedding(nn.Module):
    """Latents -> their picture -> the U-Net's deepest level -> tokens."""

    kernel: Tensor
    bias: Tensor

    def __init__(self, channels: int, patch_size: int, width: int, seed: int) -> None:
        """`patch_size` (latent voxels per edge of a token) is a multiple of `LATENTS_PER_CELL`; until the
        picture is set, it is empty."""
        super().__init__()
        self.register_buffer("kernel", torch.zeros(PATCH_VOXELS, channels, 3, 3, 3))
        self.register_buffer("bias", torch.zeros(PATCH_VOXELS))
        self.levels = VolumeLevels()
        cells = patch_size // LATENTS_PER_CELL
        self.join = nn.Conv3d(WIDTHS[-1], width, cells, stride=cells)
        if not self.join.weight.is_meta:
            start_weights(self.levels, seed_of("fedmeduet volume embedding", seed))
            nn.init.zeros_(self.join.weight)
            nn.init.zeros_(self.join.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def set_picture(self, moments: NeighbourMoments) -> None:
        """Decode as is best for latents and patches with these moments: public ones."""
        kernel, bias = best_decoder(moments, _LATENT_NOISE)
        self.kernel.copy_(kernel)
        self.bias.copy_(bias)

    @torch.no_grad()
    def see_as(self, other: "VolumeEmbedding") -> None:
        """Take the picture of another network of these latents."""
        self.kernel.copy_(other.kernel)
        self.bias.copy_(other.bias)

    def picture(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 D H W"]:
        """The volume that these latents tell of, about [0, 1]."""
        return from_patches(F.conv3d(latents, self.kernel, self.bias, padding=1))

    def forward(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b n k"]:
        """What the U-Net sees in the picture of raw latents, at each token."""
        tokens: Tensor = self.join(self.levels.deepest(self.picture(latents))).flatten(2).transpose(1, 2)
        return tokens


def embedding_activations(latent_grid: tuple[int, int, int]) -> int:
    """Numbers that the levels hand on for one volume."""
    cubes = math.prod(latent_grid) * PATCH_VOXELS / 8
    return round(cubes * _PER_CUBE)
