"""Token demixing: two volumes share one token grid, and the model must say whose token is whose.

Volumes are paired. The two of a pair share one mask: where it is set, they exchange tokens. So the grids of a
pair hold every token of both exactly once, mixing twice is not mixing at all, and a token is sent back to its
owner, or paired with its partner's style, at the position where it belongs.

Axes: b = volumes in the batch, n = tokens per volume, c = channels of a token.
Source: MeDUET (arXiv:2602.17901), token demixing; MixMAE (arXiv:2205.13137). Differs from the authors' code
in two ways: partners are drawn, not the batch reversed; the two of a pair share a mask, where theirs are
independent while their loss assumes that they are not.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def draw_partners(
    generator: torch.Generator, batch_size: int, group_size: int | None = None
) -> Int[Tensor, " b"]:
    """Pair the batch at random, or each group of `group_size` scans in it: partner[partner[i]] == i and
    partner[i] != i.

    Raises `ValueError` when there is an odd number to pair, or fewer than 2, or the batch is not whole
    groups.
    """
    if group_size is not None:
        if group_size < 1 or batch_size % group_size:
            raise ValueError(f"Expected a batch of whole groups of {group_size}; got {batch_size} scans.")
        starts = range(0, batch_size, group_size)
        return torch.cat([start + draw_partners(generator, group_size) for start in starts])
    if batch_size < 2 or batch_size % 2:
        raise ValueError(f"Expected an even batch of at least 2, to pair its scans; got {batch_size}.")
    first, second = torch.randperm(batch_size, generator=generator).reshape(2, -1)
    partner = torch.empty(batch_size, dtype=torch.long)
    partner[first], partner[second] = second, first
    return partner


def draw_exchanged(
    generator: torch.Generator, partner: Int[Tensor, " b"], num_tokens: int, ratio: float
) -> Bool[Tensor, "b n"]:
    """Choose the positions where partners exchange tokens: exactly round(ratio * n), the same for both.

    Raises `ValueError` when the ratio leaves nothing to exchange or nothing to keep.
    """
    num_exchanged = round(ratio * num_tokens)
    if not 0 < num_exchanged < num_tokens:
        raise ValueError(
            f"Expected mask_ratio to exchange 1 to {num_tokens - 1} of {num_tokens} tokens; "
            f"{ratio} gives {num_exchanged}."
        )
    rank = torch.rand(len(partner), num_tokens, generator=generator).argsort(dim=1).argsort(dim=1)
    of_pair = torch.minimum(torch.arange(len(partner)), partner)  # the pair's lower member draws for both
    return (rank < num_exchanged)[of_pair]


def mix_tokens(
    tokens: Float[Tensor, "b n c"], partner: Int[Tensor, " b"], exchanged: Bool[Tensor, "b n"]
) -> Float[Tensor, "b n c"]:
    """Take each token from the partner where `exchanged` is set, from the volume itself elsewhere."""
    return torch.where(exchanged.unsqueeze(-1), tokens[partner], tokens)


def unmix_tokens(
    mixed: Float[Tensor, "b n c"], partner: Int[Tensor, " b"], exchanged: Bool[Tensor, "b n"]
) -> Float[Tensor, "b n c"]:
    """Send every token back to its owner, at its position.

    As pairs share masks, the exchange undoes itself: `unmix_tokens(mix_tokens(x)) == x`.
    """
    return mix_tokens(mixed, partner, exchanged)


def hidden_mean(error: Float[Tensor, "b n"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean of a per-token error over the hidden positions of all volumes."""
    weight = hidden.to(error.dtype)
    return (error * weight).sum() / weight.sum()
