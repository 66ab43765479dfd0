"""Random features: a fixed public 3-D convolutional network, the same for everyone, that nothing trained.

A second pair of eyes for sample quality beside our own encoder, which knows what the samples were made from:
small filters of random weights over four resolutions, each channel read as mean and deviation over space.
What this file does not do: it recognises nothing, it downloads nothing, and its numbers mean nothing by
themselves; read them beside those of real scans.

Axes: b = volumes, D H W = voxels, k = features.
Source: random networks as features where trained ones do not fit the images (arXiv:2002.09797, section 5).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SEED = 20260217
NUM_FEATURES = 64
_CHANNELS, _LEVELS = 8, 4
_BATCH = 16


def network() -> dict[str, Tensor]:
    """The weights, drawn from `SEED`: He's for filters of 3 cubed, and small biases."""
    generator = torch.Generator().manual_seed(SEED)
    weights: dict[str, Tensor] = {}
    channels = 1
    for level in range(_LEVELS):
        filters = torch.randn(_CHANNELS, channels, 3, 3, 3, generator=generator)
        filters[: _CHANNELS // 2] -= filters[: _CHANNELS // 2].mean((1, 2, 3, 4), keepdim=True)  # edges
        weights[f"{level}.filters"] = filters * math.sqrt(2 / (27 * channels))
        weights[f"{level}.biases"] = 0.1 * torch.randn(_CHANNELS, generator=generator)
        channels = _CHANNELS
    return weights


@torch.inference_mode()
def random_features(volumes: Float[Tensor, "b 1 D H W"]) -> Float[Tensor, "b k"]:
    """`NUM_FEATURES` numbers of each volume; intensities are clipped to [0, 1].

    Raises `ValueError` for a side below 16 voxels, too small for the coarsest resolution.
    """
    if min(volumes.shape[2:]) < 2**_LEVELS:
        raise ValueError(f"Expected sides of {2**_LEVELS} voxels or more; got {tuple(volumes.shape[2:])}.")
    weights = {name: tensor.to(volumes.device) for name, tensor in network().items()}
    return torch.cat([_features(weights, chunk) for chunk in torch.split(volumes, _BATCH)])


def _features(weights: dict[str, Tensor], volumes: Tensor) -> Tensor:
    x = volumes.float().clamp(0, 1) * 2 - 1
    features = []
    for level in range(_LEVELS):
        padded = F.pad(x, (1,) * 6, mode="replicate")
        x = F.leaky_relu(F.conv3d(padded, weights[f"{level}.filters"], weights[f"{level}.biases"]), 0.1)
        features += [x.mean((2, 3, 4)), x.std((2, 3, 4))]
        x = F.avg_pool3d(x, 2)
    return torch.cat(features, dim=1)
