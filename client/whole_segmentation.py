"""Segmenting a whole scan at a site: latents of all of the foreground in, a label map on the patient's own
grid out.

Outside the box around the foreground there is background. What it does not do: train, or write a file.

Axes: x y z = voxels as the scan stores them.
"""

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import nn

from client.latents.latent_set import LatentSet
from meduet_models.downstream.networks import predict
from meduet_models.downstream.whole_scans import predict_voxels
from scans.whole_volumes import lay_back_whole


def segment_whole(
    network: nn.Module, scans: LatentSet, row: int
) -> tuple[UInt8[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """The class of every voxel of a row's scan, with the scan's affine.

    Raises `ValueError` for scans that are crops.
    """
    if scans.crop is None:
        raise ValueError("Expected whole scans (volumes.extent: scan); these are crops.")
    logits = predict_voxels(
        lambda latents: predict(network, latents), torch.tensor(scans.whole(row)), scans.crop
    )
    classes = logits.argmax(dim=0, keepdim=True).to(torch.uint8)
    return lay_back_whole(classes, scans.whole_geometry(row))
