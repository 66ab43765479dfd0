"""Encoder and decoder: two plain vision transformers, readable in one sitting.

Pre-norm blocks, no class token (it would see both contents and both styles of a mixture and carry them around
the factors), no dropout. Attention is PyTorch's fused one. Heads, fusing and losses are elsewhere.

Axes: b = volumes, n = tokens, k = encoder width, m = decoder width, p = values in a token.
Source: ViT and MAE; sizes of MeDUET (arXiv:2602.17901).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.tokens import sincos_positions

NORM_EPS = 1e-6


class Block(nn.Module):
    """One pre-norm transformer block: attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        """Attend, then transform each token."""
        b, n, k = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, k // self.heads)
        q, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each b heads n k/heads
        attended = F.scaled_dot_product_attention(q, key, value)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, n, k))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return out


class Encoder(nn.Module):
    """Token embeddings -> features. Positions are added here, so a mixed grid needs no special care."""

    positions: Tensor

    def __init__(self, width: int, depth: int, heads: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, tokens: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        """Encode a grid of embedded tokens, its own or mixed."""
        x = tokens + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def forward_visible(
        self, tokens: Float[Tensor, "b n k"], visible: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n k"]:
        """Encode the `visible` tokens alone, as many in each volume; hidden positions come back as zeros.

        Source: MAE (arXiv:2111.06377).
        """
        count = int(visible[0].sum())
        kept = visible.int().argsort(dim=1, descending=True, stable=True)[:, :count].unsqueeze(-1)
        kept = kept.expand(-1, -1, tokens.shape[-1])  # b m k, places of the visible tokens
        x = (tokens + self.positions).gather(1, kept)
        for block in self.blocks:
            x = block(x)
        return torch.zeros_like(tokens).scatter(1, kept, self.norm(x))

    def hidden_states(self, tokens: Float[Tensor, "b n k"]) -> list[Float[Tensor, "b n k"]]:
        """What comes out of each block, first to last, before the last norm: `norm` of the last one is
        `forward`."""
        states = []
        x = tokens + self.positions
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return states


class Decoder(nn.Module):
    """Fused tokens -> latent patches. Hidden positions hold a learned mask token."""

    positions: Tensor

    def __init__(
        self, width_in: int, width: int, depth: int, heads: int, grid: tuple[int, int, int], patch_values: int
    ) -> None:
        super().__init__()
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.narrow = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predict = nn.Linear(width, patch_values)

    def forward(
        self, fused: Float[Tensor, "b n k"], visible: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """Predict every token of the grid from the `visible` ones (all of them when None)."""
        x = self.narrow(fused)  # b n m
        if visible is not None:
            x = torch.where(visible.unsqueeze(-1), x, self.mask_token.to(x.dtype))
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.predict(self.norm(x))
        return out
