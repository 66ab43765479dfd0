"""A latent volume as a grid of tokens and back, and where each token sits.

A token is a cube of `patch` latent voxels per edge with all its channels. Positions are fixed
three-dimensional sines and cosines, never learned: a learnable position table gives a patient's tokens away
in its gradient (APRIL). Nothing here has weights.

Axes: b = volumes, c = latent channels, d h w = latent voxels, n = tokens (raster order), p = values in a
token.
Source: MAE and ViT; MeDUET (arXiv:2602.17901) embeds by a strided convolution, which is the same linear map.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

SHORTEST = 2.2
"""Wavelength in tokens; at 2 all tokens of an axis would have a sine of 0."""


def patchify(latents: Float[Tensor, "b c d h w"], patch: int) -> Float[Tensor, "b n p"]:
    """Cut latents into tokens, raster order over (d, h, w); within a token the order is (c, d, h, w).

    Raises `ValueError` when an axis is not a multiple of `patch`.
    """
    _, channels, *voxels = latents.shape
    if any(size % patch for size in voxels):
        raise ValueError(f"Expected latent axes to be multiples of the patch, {patch}; got {tuple(voxels)}.")
    grid = [size // patch for size in voxels]
    x = latents.reshape(-1, channels, grid[0], patch, grid[1], patch, grid[2], patch)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # b, grid (3), c, within (3)
    return x.reshape(-1, math.prod(grid), channels * patch**3)


def unpatchify(
    tokens: Float[Tensor, "b n p"], grid: tuple[int, int, int], patch: int
) -> Float[Tensor, "b c d h w"]:
    """Put tokens of a `grid` (tokens per axis) back into latents: the inverse of `patchify`."""
    channels = tokens.shape[-1] // patch**3
    x = tokens.reshape(-1, *grid, channels, patch, patch, patch)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # b c, then (grid, within) per axis
    return x.reshape(-1, channels, *(size * patch for size in grid))


def sincos_positions(
    grid: tuple[int, int, int], width: int, within_grid: bool = False
) -> Float[Tensor, "n width"]:
    """Fixed positions: a third of the width per axis, half sines, half cosines. Wavelengths go to 10000
    tokens, times 2 pi, as published, or (`within_grid`) from `SHORTEST` tokens to four times the grid: on a
    small grid, nine tenths of the published ones hardly change from one end to the other.

    What a width that is no multiple of 6 leaves over stays zero.
    """
    per_axis = width // 6
    if per_axis == 0:
        raise ValueError(f"Expected a width of at least 6 for three axes of sines and cosines; got {width}.")
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    table = torch.zeros(math.prod(grid), width, dtype=torch.float64)
    for axis, index in enumerate(axes):
        if within_grid:
            ends = torch.tensor([SHORTEST, 4.0 * grid[axis]], dtype=torch.float64).log()
            share = torch.linspace(0, 1, per_axis, dtype=torch.float64)
            frequency = 2 * math.pi * torch.lerp(ends[:1], ends[1:], share).neg().exp()
        else:
            frequency = 10000.0 ** (-torch.arange(per_axis, dtype=torch.float64) / per_axis)
        angle = index.reshape(-1, 1) * frequency
        table[:, 2 * axis * per_axis : (2 * axis + 1) * per_axis] = angle.sin()
        table[:, (2 * axis + 1) * per_axis : (2 * axis + 2) * per_axis] = angle.cos()
    return table.float()
