"""Augmentation of volumes and their label maps: as if another patient had lain otherwise in another scanner.

Space: small turns, stretches and shifts, and a smooth deformation. Intensity: a smooth gain, a curve, blur or
its opposite, noise. Nothing is mirrored: left and right may be classes. Every draw comes from the generator
that is given, so a step is the same whenever it is asked for. Strength 1 is about nnU-Net's; at 0 nothing
changes but last digits.

Axes: b = scans, c d h w = latents, D H W = voxels.
Source: nnU-Net (doi:10.1038/s41592-020-01008-z) for the list; random gain fields as in SynthSeg
(doi:10.1016/j.media.2023.102789).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

_TURN = 0.26  # radians, about 15 degrees
_STRETCH = 0.15
_SHIFT = 0.06  # of half a side
_WARP = 0.05  # of half a side, deviation
_WARP_CELLS = 4
_GAIN = 0.25  # deviation of the log
_GAIN_CELLS = 3
_CURVE = 0.5  # of the log of the exponent
_NOISE = 0.05


def augmented(
    volumes: Float[Tensor, "b 1 D H W"],
    labels: Int64[Tensor, "b 1 D H W"],
    latents: Float[Tensor, "b c d h w"] | None,
    strength: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b 1 D H W"], Int64[Tensor, "b 1 D H W"], Float[Tensor, "b c d h w"] | None]:
    """Each scan, its labels and, where the network reads them, its latents under a draw of its own.

    Volumes stay within [0, 1]. Latents are moved on their own grid, as if they had been made of the moved
    volume (the tokenizer is nearly equivariant); how the scan is rendered is not changed in them.
    """
    grid = _places(len(volumes), tuple(volumes.shape[2:]), strength, generator).to(volumes)
    if latents is not None:
        coarse = F.interpolate(
            grid.movedim(-1, 1), size=latents.shape[2:], mode="trilinear", align_corners=False
        )
        latents = F.grid_sample(latents, coarse.movedim(1, -1), padding_mode="border", align_corners=False)
    moved = F.grid_sample(volumes, grid, padding_mode="border", align_corners=False)
    placed = F.grid_sample(labels.to(volumes.dtype), grid, mode="nearest", align_corners=False)
    return _rendered(moved, strength, generator), placed.round().long(), latents


def _places(
    count: int, sides: tuple[int, ...], strength: float, generator: torch.Generator
) -> Float[Tensor, "b D H W 3"]:
    """Where each voxel is taken from, in grid_sample's [-1, 1]."""
    draws = (2 * torch.rand(count, 9, generator=generator) - 1) * strength
    half = torch.tensor([float(side) for side in reversed(sides)])  # grid_sample counts axes from the last
    turn = torch.eye(3).repeat(count, 1, 1)
    for axis in range(3):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        angle = draws[:, axis] * _TURN
        step = torch.eye(3).repeat(count, 1, 1)
        step[:, i, i] = step[:, j, j] = angle.cos()
        step[:, i, j], step[:, j, i] = -angle.sin(), angle.sin()
        turn = turn @ step
    turn = turn * torch.exp(draws[:, 3:6] * _STRETCH).unsqueeze(2)
    turn = turn * half.reshape(1, 1, 3) / half.reshape(1, 3, 1)  # turn in voxels, not in shares of the sides
    affine = torch.cat([turn, (draws[:, 6:9] * _SHIFT).unsqueeze(2)], dim=2)
    warp = torch.randn(count, 3, *[_WARP_CELLS] * 3, generator=generator) * (_WARP * strength)
    smooth = F.interpolate(warp, size=sides, mode="trilinear", align_corners=True)
    return F.affine_grid(affine, [count, 1, *sides], align_corners=False) + smooth.movedim(1, -1)


def _rendered(
    volumes: Float[Tensor, "b 1 D H W"], strength: float, generator: torch.Generator
) -> Float[Tensor, "b 1 D H W"]:
    """Gain, curve, blur or sharpening, noise."""
    count, sides = len(volumes), tuple(volumes.shape[2:])

    def drawn() -> Tensor:
        return (2 * torch.rand(count, 1, 1, 1, 1, generator=generator) - 1).to(volumes) * strength

    log_gain = torch.randn(count, 1, *[_GAIN_CELLS] * 3, generator=generator) * (_GAIN * strength)
    gain = F.interpolate(log_gain.to(volumes), size=sides, mode="trilinear", align_corners=True).exp()
    seen = (volumes * gain).clamp(0.0, 1.0) ** torch.exp(drawn() * _CURVE)
    seen = seen + drawn() * (F.avg_pool3d(seen, 3, 1, 1, count_include_pad=False) - seen)
    noise = torch.randn(volumes.shape, generator=generator).to(volumes)
    return (seen + drawn().abs() * _NOISE * noise).clamp(0.0, 1.0)
