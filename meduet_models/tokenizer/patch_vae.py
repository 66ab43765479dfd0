"""The small tokenizer: principal components of patches, plus residual convolutions that start at zero.

Before its first step it *is* the PCA of patches (`patch_pca.py`), so training can only help; every
convolution runs on the patch grid (a quarter of the resolution per axis), because full-resolution 3-D
convolutions are what costs CPU time. There is no normalisation layer: latents depend on a neighbourhood,
not on how much of the scan was cropped. A VAE: the posterior has a mean (what is cached) and a deviation
(used in training only).

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
from meduet_models.tokenizer.patch_pca import PATCH_VOXELS, PatchComponents, from_patches, to_patches

START_LOG_VARIANCE = -7.0  # deviation .03: the first draws barely blur


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
    """Patches -> PCA coordinates + learned correction -> patches + learned correction."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        wide, deep = config.encoder_width, config.decoder_width
        self.project = nn.Conv3d(PATCH_VOXELS, config.channels, 1)
        self.encoder = nn.Sequential(
            nn.Conv3d(PATCH_VOXELS, wide, 1),
            *(ResidualBlock(wide) for _ in range(config.encoder_blocks)),
            nn.SiLU(),
        )
        self.correction = _zeroed(nn.Conv3d(wide, config.channels, 1))
        self.log_variance = _zeroed(nn.Conv3d(wide, config.channels, 1))
        nn.init.constant_(_bias(self.log_variance), START_LOG_VARIANCE)
        self.expand = nn.Conv3d(config.channels, PATCH_VOXELS, 1)
        self.decoder = nn.Sequential(
            nn.Conv3d(config.channels, deep, 3, padding=1),
            *(ResidualBlock(deep) for _ in range(config.decoder_blocks)),
            nn.SiLU(),
        )
        self.refinement = _zeroed(nn.Conv3d(deep, PATCH_VOXELS, 1))

    @torch.no_grad()
    def start_from(self, components: PatchComponents) -> None:
        """Make the linear path the PCA of patches, scaled to unit root mean square."""
        scale = components.variances.mean().sqrt().clamp_min(1e-6)
        encode, decode = components.basis / scale, components.basis.T * scale
        self.project.weight.copy_(encode[:, :, None, None, None])
        _bias(self.project).copy_(-encode @ components.mean)
        self.expand.weight.copy_(decode[:, :, None, None, None])
        _bias(self.expand).copy_(components.mean)

    def posterior(
        self, volumes: Float[Tensor, "b 1 D H W"]
    ) -> tuple[Float[Tensor, "b c d h w"], Float[Tensor, "b c d h w"]]:
        """Mean and log variance of the latents."""
        patches = to_patches(volumes)  # b p d h w
        features = self.encoder(patches)  # b k d h w
        mean: Tensor = self.project(patches) + self.correction(features)
        log_variance: Tensor = self.log_variance(features)
        return mean, log_variance.clamp(-20.0, 4.0)

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
