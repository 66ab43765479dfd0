import torch

from meduet_models.vit import Block, Decoder, Encoder

GRID = (2, 3, 2)


def test_positions_are_fixed_and_not_in_the_state() -> None:
    encoder, decoder = Encoder(24, 2, 2, GRID), Decoder(24, 12, 1, 2, GRID, 8)

    for network in (encoder, decoder):
        assert "positions" not in dict(network.named_parameters())
        assert "positions" not in network.state_dict()
        assert network.positions.requires_grad is False


def test_a_block_without_positions_commutes_with_reordering_tokens() -> None:
    block, x, order = Block(24, 2), torch.randn(2, 12, 24), torch.randperm(12)
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]), rtol=1e-4, atol=1e-5)


def test_the_encoder_tells_positions_apart() -> None:
    encoder, order = Encoder(24, 2, 2, GRID), torch.arange(12).roll(1)
    x = torch.randn(1, 12, 24)
    assert (encoder(x)[:, order] - encoder(x[:, order])).abs().max() > 1e-2


def test_hidden_tokens_never_reach_the_decoder() -> None:
    decoder = Decoder(24, 12, 2, 2, GRID, 8)
    fused, visible = torch.randn(2, 12, 24), torch.rand(2, 12) < 0.5
    changed = torch.where(visible.unsqueeze(-1), fused, torch.randn_like(fused))

    assert torch.equal(decoder(fused, visible), decoder(changed, visible))
    assert not torch.equal(decoder(fused), decoder(changed))


def test_volumes_of_a_batch_do_not_see_each_other() -> None:
    encoder, x = Encoder(24, 2, 2, GRID), torch.randn(4, 12, 24)
    alone = torch.cat([encoder(row) for row in x.split(1)])
    torch.testing.assert_close(encoder(x), alone, rtol=1e-4, atol=1e-5)


def test_visible_tokens_are_encoded_alone() -> None:
    encoder = Encoder(12, 2, 2, (2, 2, 3))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 12, generator=generator)
    visible = torch.rand(3, 12, generator=generator).argsort(1) < 5
    features = encoder.forward_visible(x, visible)
    assert not bool(features[~visible].any())  # hidden positions hold nothing
    other = torch.where(visible.unsqueeze(-1), x, torch.randn(3, 12, 12, generator=generator))
    assert torch.equal(encoder.forward_visible(other, visible), features)
    whole = torch.ones(3, 12, dtype=torch.bool)
    torch.testing.assert_close(encoder.forward_visible(x, whole), encoder(x))
