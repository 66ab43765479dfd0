"""Membership of a content branch in the hands of a reader who has the encoder and no decoder.

Two scores of a scan. `invariance`: how much its content tokens move when noise that everybody can draw is
added to it, over their own spread; little for whom the encoder was taught. `parts`: a block of the scan is
shown alone, everything else lent by a public partner of noise; how much more is what is read of the block
like the same place of the whole scan than like its other places, in deviations over places? More for whom it
was taught.

Every scan and every model is told the same draws.
What this file does not do: judge (`membership.py`).

Source: invariance: Wang et al. 2024 (arXiv:2401.12233); parts: Zhu et al. 2024 (arXiv:2404.02462).

Axes: n = scans, b = scans at once, t = tokens, k = content channels, c d h w = latents.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from meduet_models.meduet import FactorNetwork, layer_normed

_SCANS_AT_ONCE = 16
_NOISE = 0.5  # of a channel's deviation
_EDGE = 0.5  # of a block, over that of the grid


def residuals(
    network: FactorNetwork, latents: Float[Tensor, "n c d h w"], draws: int, seed: int = 0
) -> Float[Tensor, " n"]:
    """Mean square by which content tokens move under noise, over their mean square about their own mean."""
    noises = list(_noises(network, draws, seed))
    return torch.cat([_residual(network, some, noises) for some in torch.split(latents, _SCANS_AT_ONCE)])


def responses(
    network: FactorNetwork, latents: Float[Tensor, "n c d h w"], draws: int, seed: int = 0
) -> Float[Tensor, " n"]:
    """How much more a block is like its own place of the whole scan than like others, in deviations."""
    lent = list(zip(_noises(network, draws, seed), _blocks(network, draws, seed), strict=True))
    return torch.cat([_response(network, some, lent) for some in torch.split(latents, _SCANS_AT_ONCE)])


@torch.no_grad()
def _residual(
    network: FactorNetwork, latents: Float[Tensor, "b c d h w"], noises: list[Tensor]
) -> Float[Tensor, " b"]:
    clean = _content(network, network.embed_latents(latents))
    spread = (clean - clean.mean(1, keepdim=True)).square().mean((1, 2))
    total = torch.zeros(len(latents), dtype=torch.float64)
    for noise in noises:
        moved = _content(network, network.embed_latents(latents + _NOISE * noise)) - clean
        total += (moved.square().mean((1, 2)) / spread).double()
    return total / len(noises)


@torch.no_grad()
def _response(
    network: FactorNetwork, latents: Float[Tensor, "b c d h w"], lent: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, " b"]:
    tokens = network.embed_latents(latents)
    whole = F.normalize(_centred(_content(network, tokens)), dim=-1)  # b t k
    total = torch.zeros(len(latents), dtype=torch.float64)
    for noise, block in lent:
        partner = network.embed_latents((network.latent_mean + noise)[None]).expand(len(latents), -1, -1)
        shown = torch.where(block[None, :, None], tokens, partner)
        seen = F.normalize(_centred(_content(network, shown))[:, block], dim=-1)  # b (shown) k
        alike = torch.einsum("bsk,btk->bst", seen, whole)
        own = alike[:, :, block].diagonal(dim1=1, dim2=2)
        spread = alike.std(2).clamp_min(1e-12)
        total += ((own - alike.mean(2)) / spread).mean(1).double()
    return total / len(lent)


def _content(network: FactorNetwork, tokens: Float[Tensor, "b t k"]) -> Float[Tensor, "b t k"]:
    """What is read of a scan: content of the head, layer-normed."""
    return layer_normed(network.content_head(network.encoder(tokens)))


def _centred(content: Float[Tensor, "b t k"]) -> Float[Tensor, "b t k"]:
    """Less what a scan's tokens have in common."""
    return content - content.mean(1, keepdim=True)


def _noises(network: FactorNetwork, draws: int, seed: int) -> Iterator[Float[Tensor, "c d h w"]]:
    """Noise on the latents' scale."""
    generator, config = torch.Generator().manual_seed(seed), network.config
    for _ in range(draws):
        noise = torch.randn(config.latent_channels, *config.latent_grid, generator=generator)
        yield network.latent_deviation[:, None, None, None] * noise


def _blocks(network: FactorNetwork, draws: int, seed: int) -> Iterator[Bool[Tensor, " t"]]:
    """Blocks of half of each axis, anywhere."""
    generator, grid = torch.Generator().manual_seed(seed), network.config.token_grid
    for _ in range(draws):
        shown = torch.zeros(grid, dtype=torch.bool)
        edges = [max(1, math.ceil(_EDGE * size)) for size in grid]
        first = [
            int(torch.randint(size - edge + 1, (), generator=generator))
            for size, edge in zip(grid, edges, strict=True)
        ]
        d, h, w = (slice(at, at + edge) for at, edge in zip(first, edges, strict=True))
        shown[d, h, w] = True
        yield shown.flatten()
