"""Encoder and decoder: two plain vision transformers, readable in one sitting.

Pre-norm blocks, no class token (it would see both contents and both styles of a mixture and carry them around
the factors), no dropout. Attention is PyTorch's fused one. Heads, fusing and losses are elsewhere.

A network may look at neighbours first (`neighbour_bias`): a fixed term of attention that is best for the
token one step along a head's own axis, so that a convolution need not be learned from nothing. It has no
weights: a learned table of positions gives a patient's tokens away in its gradient.

Axes: b = volumes, n = tokens, k = encoder width, m = decoder width, p = values in a token.
Source: ViT and MAE; sizes of MeDUET (arXiv:2602.17901); the bias is the start of ConViT (arXiv:2103.10697).
"""

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.tokens import sincos_positions

NORM_EPS = 1e-6
SHARPNESS = 2.0
"""Of the neighbours' bias. Of 1 and 2 the better (docs/log.md)."""


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

    @property
    def added(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers whose outputs are added to the tokens."""
        return self.proj, self.contract

    def forward(
        self, x: Float[Tensor, "b n k"], bias: Float[Tensor, "*b heads n n"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Attend, then transform each token. `bias` is added to what queries (rows) make of keys."""
        b, n, k = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, k // self.heads)
        q, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each b heads n k/heads
        mask = None if bias is None else bias.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, n, k))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return out


def neighbour_bias(grid: tuple[int, int, int], heads: int) -> Float[Tensor, "heads n n"]:
    """Minus `SHARPNESS` times the squared distance, in tokens, of each key from the place one step off the
    query.

    The six directions are dealt to the first six heads, back and forth along each axis; heads beyond have no
    bias. A query at the border prefers itself, there being nobody beyond.
    """
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], dim=1)  # n 3
    offset = place.unsqueeze(0) - place.unsqueeze(1)  # n n 3, from query to key
    bias = torch.zeros(heads, len(place), len(place))
    for head, (axis, step) in zip(range(heads), itertools.product(range(3), (-1.0, 1.0)), strict=False):
        wanted = torch.zeros(3)
        wanted[axis] = step
        bias[head] = -SHARPNESS * (offset - wanted).square().sum(dim=2)
    return bias


class Encoder(nn.Module):
    """Token embeddings -> features. Positions are added here, so a mixed grid needs no special care."""

    positions: Tensor
    bias: Tensor | None

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int, int],
        neighbours: bool = False,
        within_grid: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("positions", sincos_positions(grid, width, within_grid), persistent=False)
        self.register_buffer("bias", neighbour_bias(grid, heads) if neighbours else None, persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, tokens: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        """Encode a grid of embedded tokens, its own or mixed."""
        x = tokens + self.positions
        for block in self.blocks:
            x = block(x, self.bias)
        out: Tensor = self.norm(x)
        return out

    def forward_visible(
        self, tokens: Float[Tensor, "b n k"], visible: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n k"]:
        """Encode the `visible` tokens alone, as many in each volume; hidden positions come back as zeros.

        Source: MAE (arXiv:2111.06377).
        """
        count = int(visible[0].sum())
        places = visible.int().argsort(dim=1, descending=True, stable=True)[:, :count]  # b v
        kept = places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # b v k
        x = (tokens + self.positions).gather(1, kept)
        bias = None
        if self.bias is not None:
            bias = self.bias[:, places.unsqueeze(2), places.unsqueeze(1)].transpose(0, 1)  # b heads v v
        for block in self.blocks:
            x = block(x, bias)
        return torch.zeros_like(tokens).scatter(1, kept, self.norm(x))

    def hidden_states(self, tokens: Float[Tensor, "b n k"]) -> list[Float[Tensor, "b n k"]]:
        """What comes out of each block, first to last, before the last norm: `norm` of the last one is
        `forward`."""
        states = []
        x = tokens + self.positions
        for block in self.blocks:
            x = block(x, self.bias)
            states.append(x)
        return states


class Decoder(nn.Module):
    """Fused tokens -> latent patches. Hidden positions hold a learned mask token."""

    positions: Tensor
    bias: Tensor | None

    def __init__(
        self,
        width_in: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int, int],
        patch_values: int,
        neighbours: bool = False,
        within_grid: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("positions", sincos_positions(grid, width, within_grid), persistent=False)
        self.register_buffer("bias", neighbour_bias(grid, heads) if neighbours else None, persistent=False)
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
            x = block(x, self.bias)
        out: Tensor = self.predict(self.norm(x))
        return out
