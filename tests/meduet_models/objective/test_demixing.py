import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meduet_models.objective.demixing import (
    draw_exchanged,
    draw_partners,
    hidden_mean,
    mix_tokens,
    unmix_tokens,
)

pairs = st.integers(1, 6).map(lambda half: 2 * half)


@settings(max_examples=30, deadline=None)
@given(batch=pairs, tokens=st.integers(2, 30), ratio=st.floats(0.3, 0.7), seed=st.integers(0, 10**6))
def test_every_token_comes_back_to_its_owner_and_position(
    batch: int, tokens: int, ratio: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    partner = draw_partners(generator, batch)
    exchanged = draw_exchanged(generator, partner, tokens, ratio)
    owner = torch.arange(batch).reshape(-1, 1, 1).expand(-1, tokens, 1)
    position = torch.arange(tokens).reshape(1, -1, 1).expand(batch, -1, 1)
    named = torch.cat([owner, position], dim=2).float()  # each token says whose it is and where

    mixed = mix_tokens(named, partner, exchanged)

    assert torch.equal(mixed[..., 1], named[..., 1])  # nothing moves within the grid
    assert torch.equal(mixed[..., 0] == partner.unsqueeze(1), exchanged)  # foreign exactly where exchanged
    assert torch.equal(unmix_tokens(mixed, partner, exchanged), named)


@settings(max_examples=30, deadline=None)
@given(batch=pairs, tokens=st.integers(2, 40), ratio=st.floats(0.3, 0.7), seed=st.integers(0, 10**6))
def test_pairs_exclude_oneself_share_a_mask_and_exchange_the_exact_share(
    batch: int, tokens: int, ratio: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    partner = draw_partners(generator, batch)
    exchanged = draw_exchanged(generator, partner, tokens, ratio)

    assert torch.equal(partner[partner], torch.arange(batch))
    assert bool((partner != torch.arange(batch)).all())
    assert torch.equal(exchanged[partner], exchanged)
    assert torch.equal(exchanged.sum(1), torch.full((batch,), round(ratio * tokens)))


def test_different_pairs_have_different_masks_and_draws_can_be_replayed() -> None:
    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        partner = draw_partners(generator, 8)
        return partner, draw_exchanged(generator, partner, 96, 0.5)

    partner, exchanged = draw(0)
    assert len(exchanged.unique(dim=0)) == 4
    assert torch.equal(draw(0)[0], partner) and torch.equal(draw(0)[1], exchanged)
    assert not torch.equal(draw(1)[1], exchanged)


def test_every_partner_and_position_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    met, masked = torch.zeros(6, 6), torch.zeros(12)
    for _ in range(3000):
        partner = draw_partners(generator, 6)
        met[torch.arange(6), partner] += 1
        masked += draw_exchanged(generator, partner, 12, 0.5)[0]
    # 600 expected per partner (deviation 22), 1500 per position (27): 6 deviations, false alarm below 1e-6
    assert bool((met[~torch.eye(6, dtype=torch.bool)] - 600).abs().max() < 132)
    assert bool((masked - 1500).abs().max() < 162)


def test_an_odd_batch_and_an_empty_exchange_are_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="even batch of at least 2"):
        draw_partners(generator, 5)
    for ratio in (0.0, 0.01, 1.0):
        with pytest.raises(ValueError, match="mask_ratio"):
            draw_exchanged(generator, draw_partners(generator, 4), 8, ratio)


def test_hidden_mean_counts_hidden_positions_alone() -> None:
    error = torch.tensor([[1.0, 100.0], [3.0, 100.0]])
    hidden = torch.tensor([[True, False], [True, False]])
    assert hidden_mean(error, hidden) == 2.0
