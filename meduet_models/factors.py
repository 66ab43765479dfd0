"""Content and style: the heads that part them, the statistics that style is read from, and fusing them again.

`joint` paths (as published): both heads read the same encoder features, token by token. `split` paths (ours):
content comes from latents normalised per scan and channel, style from exactly the statistics that this
normalisation removed, which are also what sites exchange; so a bank entry becomes style tokens by the same
head as a scan.

Axes: b = volumes, c = latent channels, d h w = latent voxels, gx gy gz = coarse map, v = statistics of a
scan, a = style axes, n = tokens, k = content channels, s = style channels.
Source: MeDUET (arXiv:2602.17901), content and style heads and their entangling. Differs from the authors'
code: the style head does not convolve along token order, whose neighbours differ between a mixed and a whole
grid.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.style.axes import MOST_AXES, StyleAxes

VARIANCE_FLOOR = 1e-6
"""Added to a channel's variance over a scan; latents have a variance of about 1."""


@dataclass(frozen=True)
class Factors:
    """What a scan shows (content) and how it looks (style), token by token; as the decoder reads them."""

    content: Float[Tensor, "b n k"]
    style: Float[Tensor, "b n s"]

    def __getitem__(self, rows: Tensor | slice) -> "Factors":
        """The factors of some volumes of the batch."""
        return Factors(self.content[rows], self.style[rows])


@dataclass(frozen=True)
class StyleStatistics:
    """The statistics of one scan that normalising it removes, and coarse maps of mean and deviation."""

    mean: Float[Tensor, "b c"]
    deviation: Float[Tensor, "b c"]
    coarse_map: Float[Tensor, "b c gx gy gz"]
    coarse_deviation: Float[Tensor, "b c gx gy gz"]

    def to_vector(self) -> Float[Tensor, "b v"]:
        """Means, log deviations, maps of means and of log deviations, side by side."""
        maps = (self.coarse_map.flatten(1), self.coarse_deviation.log().flatten(1))
        return torch.cat([self.mean, self.deviation.log(), *maps], dim=1)


def normalise(latents: Float[Tensor, "b c d h w"]) -> Float[Tensor, "b c d h w"]:
    """Mean 0 and deviation 1 per scan and channel over the volume; a constant channel becomes 0."""
    variance, mean = torch.var_mean(latents, dim=(2, 3, 4), correction=0, keepdim=True)
    return (latents - mean) * torch.rsqrt(variance + VARIANCE_FLOOR)


def pooling_weights(size: int, cells: int) -> Float[Tensor, "size cells"]:
    """Columns that average `size` voxels into `cells` cells, those of PyTorch's adaptive average pooling."""
    weights = torch.zeros(size, cells)
    for cell in range(cells):
        start, stop = cell * size // cells, -(-(cell + 1) * size // cells)
        weights[start:stop, cell] = 1.0 / (stop - start)
    return weights


class StyleMeter(nn.Module):
    """Measure `StyleStatistics` of raw latents. Nothing is learned."""

    weights_d: Tensor
    weights_h: Tensor
    weights_w: Tensor

    def __init__(self, latent_grid: tuple[int, int, int], map_grid: tuple[int, int, int]) -> None:
        super().__init__()
        for name, size, cells in zip("dhw", latent_grid, map_grid, strict=True):
            self.register_buffer(f"weights_{name}", pooling_weights(size, cells), persistent=False)

    def forward(self, latents: Float[Tensor, "b c d h w"]) -> StyleStatistics:
        """Channel means, channel deviations and coarse maps over each scan."""
        variance, mean = torch.var_mean(latents, dim=(2, 3, 4), correction=0)
        coarse, square = (
            torch.einsum("bcdhw,dx,hy,wz->bcxyz", x, self.weights_d, self.weights_h, self.weights_w)
            for x in (latents, latents.square())
        )
        within = (square - coarse.square()).clamp(min=0)
        return StyleStatistics(
            mean, (variance + VARIANCE_FLOOR).sqrt(), coarse, (within + VARIANCE_FLOOR).sqrt()
        )


class ContentHead(nn.Module):
    """One linear map per token, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, features: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        """Content of each token."""
        content: Tensor = self.linear(features)
        return content


class TokenStyleHead(nn.Module):
    """`joint` paths: one linear map per token from the encoder's features."""

    def __init__(self, width: int, style_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, style_width, bias=False)

    def forward(self, features: Float[Tensor, "b n k"]) -> Float[Tensor, "b n s"]:
        """Style of each token."""
        style: Tensor = self.linear(features)
        return style


class StatisticsStyleHead(nn.Module):
    """`split` paths: a small MLP of means, log deviations and the nearest cells of the coarse maps. No
    attention. With style axes it sees where a scan lies along them, and nothing beside them."""

    cell: Tensor
    axes_centre: Tensor
    axes_read: Tensor
    axes_back: Tensor
    beside: Tensor

    def __init__(
        self,
        channels: int,
        style_width: int,
        token_grid: tuple[int, int, int],
        map_grid: tuple[int, int, int],
    ) -> None:
        super().__init__()
        axes = [
            torch.tensor([int((t + 0.5) * cells / size) for t in range(size)])
            for size, cells in zip(token_grid, map_grid, strict=True)
        ]
        d, h, w = torch.meshgrid(*axes, indexing="ij")
        cell = (d * map_grid[1] + h) * map_grid[2] + w
        self.register_buffer("cell", cell.flatten(), persistent=False)  # n
        self._channels = channels
        statistics = 2 * channels * (1 + math.prod(map_grid))
        self.register_buffer("axes_centre", torch.zeros(statistics))
        self.register_buffer("axes_read", torch.zeros(MOST_AXES, statistics))
        self.register_buffer("axes_back", torch.zeros(statistics, MOST_AXES))
        self.register_buffer("beside", torch.ones(1))  # share of what no axis tells that is seen
        self.expand = nn.Linear(4 * channels, 4 * style_width)
        self.contract = nn.Linear(4 * style_width, style_width)

    @torch.no_grad()
    def set_axes(self, axes: StyleAxes) -> None:
        """See of a scan where it lies along these axes, and nothing beside them."""
        self.axes_centre.copy_(axes.centre)
        self.axes_read.zero_()[: len(axes.read)].copy_(axes.read)
        self.axes_back.zero_()[:, : len(axes.read)].copy_(axes.back)
        self.beside.zero_()

    def forward(self, statistics: StyleStatistics) -> Float[Tensor, "b n s"]:
        """Style of each token, from statistics that the caller has brought to a common scale."""
        channels = self._channels
        apart = statistics.to_vector() - self.axes_centre
        told = self.axes_centre + self.beside * apart + apart @ self.axes_read.T @ self.axes_back.T  # b v
        whole, maps = told[:, : 2 * channels].unsqueeze(1), told[:, 2 * channels :]  # b 1 2c, b 2c·cells
        by_cell = maps.reshape(len(told), 2 * channels, -1)[:, :, self.cell].transpose(1, 2)  # b n 2c
        x = torch.cat([whole.expand(-1, by_cell.shape[1], -1), by_cell], dim=2)  # b n 4c
        style: Tensor = self.contract(F.gelu(self.expand(x)))
        return style


class Fuse(nn.Module):
    """Content and style of a token become one again: a linear map of both."""

    def __init__(self, width: int, style_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width + style_width, width)

    def forward(self, factors: Factors) -> Float[Tensor, "b n k"]:
        """Fuse token by token."""
        fused: Tensor = self.linear(torch.cat([factors.content, factors.style], dim=-1))
        return fused
