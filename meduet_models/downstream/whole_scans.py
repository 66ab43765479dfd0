"""A downstream network over a whole scan: a window of its grid slides, neighbours overlap and are blended.

A class of every voxel: MONAI's sliding window with a Gaussian. One answer per scan: the mean over windows,
each as much as it holds foreground. What this file does not do: train, or lay a prediction back on the
patient's grid (`client/whole_segmentation.py`).

Axes: c = latent channels, d h w = latents of the whole scan, D H W = its voxels.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meduet_models.diffusion.whole_scans import Windows

OVERLAP = 0.5
"""Of neighbouring windows, along each axis."""


@torch.inference_mode()
def predict_voxels(
    network: nn.Module, latents: Float[Tensor, "c d h w"], grid: tuple[int, int, int]
) -> Float[Tensor, "classes D H W"]:
    """Logits of every voxel, on the CPU; `grid`: latents that the network sees at once."""
    from monai.inferers.utils import sliding_window_inference

    device = next(network.parameters()).device
    logits: Tensor = sliding_window_inference(
        latents[None], grid, 1, network, overlap=OVERLAP, mode="gaussian", sw_device=device,
        device=torch.device("cpu"),
    )  # fmt: skip
    return logits[0]


@torch.inference_mode()
def predict_scan(
    network: nn.Module,
    latents: Float[Tensor, "c d h w"],
    foreground: Bool[Tensor, "d h w"],
    grid: tuple[int, int, int],
) -> Float[Tensor, " outputs"]:
    """Outputs of the scan, on the CPU: the mean over its windows, each as much as it holds foreground."""
    device = next(network.parameters()).device
    windows = Windows.over(tuple(latents.shape[1:]), grid)
    shares = torch.cat(
        [windows.cut(foreground[None].float(), numbers).mean((1, 2, 3, 4)) for numbers in windows.chunks()]
    )
    outputs = torch.cat(
        [network(windows.cut(latents, numbers).to(device)).cpu() for numbers in windows.chunks()]
    )
    return (outputs * shares[:, None]).sum(0) / shares.sum()
