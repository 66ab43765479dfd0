import torch

from meduet_models.vit import Block, Decoder, Encoder, neighbour_bias

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


def place(token: int) -> tuple[int, int, int]:
    """Where a token of `GRID` is."""
    return token // 6, token // 2 % 3, token % 2


def test_each_of_six_heads_prefers_the_token_one_step_along_its_direction() -> None:
    bias = neighbour_bias(GRID, 8)
    steps = [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]
    for head, step in enumerate(steps):
        for query in range(12):
            wanted = tuple(a + b for a, b in zip(place(query), step, strict=True))
            inside = all(0 <= a < size for a, size in zip(wanted, GRID, strict=True))
            assert place(int(bias[head, query].argmax())) == (wanted if inside else place(query))
    assert not bias[6:].any()


def test_the_preference_does_not_depend_on_where_the_query_is() -> None:
    bias = neighbour_bias((3, 3, 3), 6).reshape(6, 3, 3, 3, 3, 3, 3)
    for axis in range(3):
        low = bias.narrow(1 + axis, 0, 2).narrow(4 + axis, 0, 2)
        torch.testing.assert_close(low, bias.narrow(1 + axis, 1, 2).narrow(4 + axis, 1, 2))


def test_visible_tokens_keep_their_own_preferences_when_encoded_alone() -> None:
    encoder = Encoder(12, 2, 6, (2, 2, 3), neighbours=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 12, generator=generator)
    visible = torch.rand(3, 12, generator=generator).argsort(1) < 5
    features = encoder.forward_visible(x, visible)
    for row, (scan, shown) in enumerate(zip(x, visible, strict=True)):
        rows = shown.nonzero()[:, 0]
        alone = scan[rows][None] + encoder.positions[rows]
        for block in encoder.blocks:
            alone = block(alone, encoder.bias[:, rows][:, :, rows])
        torch.testing.assert_close(features[row, rows], encoder.norm(alone)[0])
    whole = torch.ones(3, 12, dtype=torch.bool)
    torch.testing.assert_close(encoder.forward_visible(x, whole), encoder(x))
    torch.testing.assert_close(encoder.norm(encoder.hidden_states(x)[-1]), encoder(x))


def test_the_bias_is_fixed_and_not_in_the_state() -> None:
    decoder = Decoder(24, 12, 1, 2, GRID, 8, neighbours=True)
    assert "bias" not in decoder.state_dict() and "bias" not in dict(decoder.named_parameters())
