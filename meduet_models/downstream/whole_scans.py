"""A downstream network over a whole scan: a window of its grid slides, neighbours overlap and are blended.

A class of every voxel, by MONAI's sliding window with a Gaussian. What this file does not do: train, or lay a
prediction back on the patient's grid (`client/products/segmentation.py`).

Axes: c = latent channels, d h w = latents of the whole scan, D H W = its voxels.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.windows import OVERLAP

Predictor = Callable[[Tensor], Tensor]
"""Latents of crops, b c d h w, to the outputs of a network, both on the CPU."""


@torch.inference_mode()
def predict_voxels(
    predictor: Predictor, latents: Float[Tensor, "c d h w"], grid: tuple[int, int, int]
) -> Float[Tensor, "classes D H W"]:
    """Logits of every voxel, on the CPU; `grid`: latents that the network sees at once."""
    from monai.inferers.utils import sliding_window_inference

    logits: Tensor = sliding_window_inference(
        latents[None], grid, 1, predictor, overlap=OVERLAP, mode="gaussian"
    )
    return logits[0]
