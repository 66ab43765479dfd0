"""The baseline without an encoder: a U-Net over the latents that the others see.

All networks see the same input, and the frozen tokenizer is everybody's stem. What this file does not do: it
learns nothing from pretraining.

Axes: b = scans, c = latent channels, d h w = latent voxels, D H W = voxels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meduet_models.downstream.baselines import PlainVolumeUNet
from meduet_models.downstream.networks import WIDTH, PretrainedNetwork, initialise
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.factors import normalise
from meduet_models.tokenizer.tokenizer import STRIDE
from meduet_models.volume_unet import depth_to_space


class SmallUNet(nn.Module):
    """The baseline: a MONAI U-Net of two resolutions over latents as they are and normalised per scan."""

    def __init__(self, latent_channels: int, outputs: int, *, per_voxel: bool, seed: int = 0) -> None:
        """`per_voxel`: so many outputs per voxel, or per scan."""
        from monai.networks.nets import UNet  # MONAI takes seconds to import

        super().__init__()
        self.per_voxel = per_voxel
        values = outputs * (STRIDE**3 if per_voxel else 1)
        with torch.device("meta"):
            channels = (WIDTH, 2 * WIDTH, 2 * WIDTH)
            unet = UNet(3, 2 * latent_channels, WIDTH, channels, (1, 2), num_res_units=2)
            self.head = nn.ModuleDict({"unet": unet, "predict": nn.Conv3d(WIDTH, values, 1)})
        initialise(self.head, seed)

    def forward(
        self, latents: Float[Tensor, "b c d h w"]
    ) -> Float[Tensor, "b outputs D H W"] | Float[Tensor, "b outputs"]:
        """Outputs per voxel, or per scan (the mean over the latent grid).

        Raises `ValueError` for a latent grid with an odd axis, which one halving does not divide.
        """
        if any(size % 2 for size in latents.shape[2:]):
            raise ValueError(f"Expected an even latent grid for the U-Net; got {tuple(latents.shape[2:])}.")
        out: Tensor = self.head["predict"](self.head["unet"](torch.cat([normalise(latents), latents], dim=1)))
        return depth_to_space(out, STRIDE) if self.per_voxel else out.mean((2, 3, 4))


DownstreamNetwork = PretrainedNetwork | SmallUNet | PlainVolumeUNet | VolumeSegmenter
