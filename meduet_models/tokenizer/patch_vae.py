"""The small tokenizer: a linear pair of maps, plus residual convolutions that start at zero.

Before its first step it *is* the PCA of patches (`patch_pca.py`), decoded by the best linear map of 27
latents (`linear_decoder.py`), so training can only help; every convolution runs on the patch grid (a quarter
of the resolution per axis), because full-resolution 3-D convolutions are what costs CPU time. There is no
normalisation layer: latents depend on a neighbourhood, not on how much of the scan was cropped. A VAE whose
posterior has one fixed deviation (used in training only): a learnt one, read from the encoder's features,
made them explode, and 8 and 16 channels stayed where PCA starts.

Axes: b = volumes, p = voxels of a patch (64), c = latent channels, k = features, D H W = voxels,
d h w = patches.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from forms.ranges import Range
from meduet_models.tokenizer.linear_decoder import NeighbourMoments, best_decoder
from meduet_models.tokenizer.patch_pca import PATCH_VOXELS, PatchComponents, from_patches, to_patches

POSTERIOR_DEVIATION = 0.03  # of every latent; their own is about 1


@dataclass(frozen=True, kw_only=True)
class PatchVAEConfig:
    """Size of the small tokenizer."""

    channels: Annotated[int, Range(at_least=1, at_most=256)] = 4
    """Latent channels."""
    encoder_width: Annotated[int, Range(at_least=1, at_most=1024)] = 48
    """Features of the encoder's residual path."""
    encoder_blocks: Annotated[int, Range(at_least=0, at_most=64)] = 2
    """Residual blocks of the encoder."""
    decoder_width: Annotated[int, Range(at_least=1, at_most=1024)] = 64
    """Features of the decoder's residual path."""
    decoder_blocks: Annotated[int, Range(at_least=0, at_most=64)] = 3
    """Residual blocks of the decoder."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions added to their input; the second starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.second = _zeroed(nn.Conv3d(width, width, 3, padding=1))

    def forward(self, x: Float[Tensor, "b k d h w"]) -> Float[Tensor, "b k d h w"]:
        """Add the block's correction."""
        y: Tensor = self.second(functional.silu(self.first(functional.silu(x))))
        return x + y


class PatchVAE(nn.Module):
    """Patches -> PCA coordinates + learned correction -> linear in 27 latents + learned correction."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        self.config = config
        wide, deep = config.encoder_width, config.decoder_width
        self.project = nn.Conv3d(PATCH_VOXELS, config.channels, 1)
        self.encoder = nn.Sequential(
            nn.Conv3d(PATCH_VOXELS, wide, 1),
            *(ResidualBlock(wide) for _ in range(config.encoder_blocks)),
            nn.SiLU(),
        )
        self.correction = _zeroed(nn.Conv3d(wide, config.channels, 1))
        self.expand = nn.Conv3d(config.channels, PATCH_VOXELS, 3, padding=1)
        self.decoder = nn.Sequential(
            nn.Conv3d(config.channels, deep, 3, padding=1),
            *(ResidualBlock(deep) for _ in range(config.decoder_blocks)),
            nn.SiLU(),
        )
        self.refinement = _zeroed(nn.Conv3d(deep, PATCH_VOXELS, 1))

    @torch.no_grad()
    def start_encoder_from(self, components: PatchComponents) -> None:
        """Make the encoder the PCA of patches, scaled to unit root mean square."""
        encode = components.basis / components.variances.mean().sqrt().clamp_min(1e-6)
        self.project.weight.copy_(encode[:, :, None, None, None])
        _bias(self.project).copy_(-encode @ components.mean)

    @torch.no_grad()
    def start_decoder_from(self, moments: NeighbourMoments) -> None:
        """Make the decoder the best linear one of these latents as they are drawn from the posterior."""
        kernel, bias = best_decoder(moments, POSTERIOR_DEVIATION)
        self.expand.weight.copy_(kernel)
        _bias(self.expand).copy_(bias)

    def posterior_mean(self, volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b c d h w"]:
        """Mean of the latents: no random draw."""
        patches = to_patches(volumes)
        mean: Tensor = self.project(patches) + self.correction(self.encoder(patches))
        return mean

    def reconstruct(self, latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b 1 D H W"]:
        """Volumes of these latents; not clipped to [0, 1]."""
        return from_patches(self.expand(latents) + self.refinement(self.decoder(latents)))


def _bias(layer: nn.Conv3d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _zeroed(layer: nn.Conv3d) -> nn.Conv3d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))
    return layer
