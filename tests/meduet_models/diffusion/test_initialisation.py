"""The transformer starts with what the encoder's blocks compute, behind closed gates, or says why not."""

import dataclasses

import pytest
import torch

from meduet_models.diffusion.conditions import Conditions
from meduet_models.diffusion.initialisation import first_transformer, start_from_encoder
from meduet_models.diffusion.settings import DiffusionTraining
from meduet_models.diffusion.transformer import DiffusionBlock, DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from meduet_models.tokens import patchify
from tests.meduet_models.diffusion.small_models import (
    NETWORK,
    SHAPE,
    generator,
    small_conditioner,
    small_config,
    small_encoder,
    small_examples,
)


def trained_encoder(**changes: object) -> FactorNetwork:
    """An encoder none of whose norms and biases is trivial."""
    encoder = FactorNetwork(dataclasses.replace(NETWORK, **changes), seed=1).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator(parameter.numel()))
    return encoder


@torch.no_grad()
def opened(transformer: DiffusionTransformer) -> DiffusionTransformer:
    """The same with every gate at one: the encoder's blocks as they were."""
    for block in transformer.blocks:
        assert isinstance(block, DiffusionBlock)
        for gate in block.modulation.bias.chunk(6)[2::3]:
            gate.fill_(1.0)
    return transformer


def test_each_block_begins_as_the_identity_whatever_is_told() -> None:
    transformer = DiffusionTransformer(small_config(), seed=5)
    start_from_encoder(transformer, trained_encoder())
    x = torch.randn(3, 12, 24, generator=generator(2))
    condition = torch.randn(3, 24, generator=generator(3))
    for block in transformer.blocks:
        assert torch.equal(block(x, condition), x)


def test_behind_the_gates_is_what_the_encoders_blocks_computed() -> None:
    encoder = trained_encoder()
    transformer = DiffusionTransformer(small_config(), seed=5)
    start_from_encoder(transformer, encoder)
    opened(transformer)
    x = torch.randn(3, 12, 24, generator=generator(2))
    condition = torch.randn(3, 24, generator=generator(3))  # whatever is told: its effect starts at zero
    for block, theirs in zip(transformer.blocks, encoder.encoder.blocks, strict=True):
        y = theirs(x)
        torch.testing.assert_close(block(x, condition), y, atol=1e-5, rtol=1e-5)
        x = y


def test_the_whole_stack_reads_standardised_latents_as_the_encoder_does() -> None:
    encoder = trained_encoder(factor_paths="joint")
    encoder.set_latent_scale(small_encoder().latent_mean, small_encoder().latent_deviation)
    transformer = first_transformer(small_config(), encoder, DiffusionTraining(start="encoder"), seed=5)
    examples = small_examples(2)
    conditions = small_conditioner().conditions(examples, ("content", "style"))
    states = encoder.encoder.hidden_states(encoder.embed_latents(examples.latents))
    data = transformer.standardise(examples.latents)
    times = torch.tensor([0.3, 1.0])
    hidden = opened(transformer).velocity_and_hidden(data, times, conditions)[1]
    torch.testing.assert_close(hidden, states[0], atol=1e-5, rtol=1e-5)  # one of two blocks
    assert not transformer(data, torch.ones(2), Conditions()).any()


def test_closed_gates_learn_and_open_in_the_first_steps() -> None:
    transformer = first_transformer(
        small_config(), trained_encoder(), DiffusionTraining(start="encoder"), seed=5
    )
    examples = small_examples(2)
    conditions = small_conditioner().conditions(examples, ("content", "style"))
    data = transformer.standardise(examples.latents)
    optimiser = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    for _ in range(3):  # the prediction first, then what stands before it
        optimiser.zero_grad()
        velocity = transformer(data, torch.tensor([0.3, 0.6]), conditions)
        (velocity - data).square().mean().backward()
        optimiser.step()
    for block in transformer.blocks:
        assert isinstance(block, DiffusionBlock)
        assert all(bool(gate.any()) for gate in block.modulation.bias.chunk(6)[2::3])


def test_split_encoders_see_about_what_they_saw() -> None:
    encoder = trained_encoder()
    mean = torch.randn(2, 4, 6, 4, generator=generator(1))
    encoder.set_latent_scale(mean, torch.tensor([0.5, 2.0]))
    transformer = first_transformer(small_config(), encoder, DiffusionTraining(start="encoder"), seed=5)
    noise = torch.randn(200, 2, 4, 6, 4, generator=generator(2))
    latents = mean + noise * torch.tensor([0.5, 2.0]).reshape(-1, 1, 1, 1)
    seen = encoder.embed_latents(latents) - encoder.embed.bias
    ours = patchify(transformer.standardise(latents), 2) @ transformer.embed.weight.detach().T
    slope = float((seen * ours).sum() / ours.square().sum())
    assert slope == pytest.approx(1.0, abs=0.1)


def test_from_scratch_no_block_knows_the_encoder() -> None:
    encoder = small_encoder()
    transformer = first_transformer(small_config(), encoder, DiffusionTraining(start="scratch"), seed=5)
    assert torch.equal(transformer.latent_mean, encoder.latent_mean)
    assert not transformer.blocks[0].modulation.bias.any()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("change", [{"width": 48}, {"depth": 3}, {"heads": 4}, {"patch_size": 1}])
def test_an_encoder_of_another_size_is_refused(change: dict[str, int]) -> None:
    transformer = DiffusionTransformer(small_config(shape=dataclasses.replace(SHAPE, **change)))
    with pytest.raises(
        ValueError, match=r"patch_size, width, depth and heads, 2, 24, 2, 2, to start from it"
    ):
        start_from_encoder(transformer, small_encoder())
