"""The smallest encoder, examples and transformer that show everything; shared by the tests of this folder."""

import torch

from meduet_models.diffusion.conditioner import Conditioner, condition_sizes
from meduet_models.diffusion.conditions import CONDITIONS, Condition, Examples
from meduet_models.diffusion.path import PathName
from meduet_models.diffusion.settings import TransformerShape
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from tests.worlds import small_network

NETWORK = small_network(width=24, depth=2)
SHAPE = TransformerShape(patch_size=2, width=24, depth=2, heads=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_latents(count: int, seed: int = 0) -> torch.Tensor:
    return 1.5 * torch.randn(count, 2, 4, 6, 4, generator=generator(seed)) + 0.3


def small_encoder(seed: int = 3) -> FactorNetwork:
    encoder = FactorNetwork(NETWORK, seed=seed).eval().requires_grad_(False)
    encoder.set_latent_scale(
        0.5 * torch.randn(2, 4, 6, 4, generator=generator(seed)), torch.tensor([0.7, 1.9])
    )
    return encoder


def small_conditioner(maps: bool = True) -> Conditioner:
    return Conditioner(small_encoder(), maps=maps)


def small_examples(count: int, seed: int = 0) -> Examples:
    draws = generator(seed)
    labels = torch.rand(count, 3, 4, 6, 4, generator=draws)
    return Examples(
        latents=small_latents(count, seed),
        site=torch.arange(count) % 3,
        body_part=torch.zeros(count, dtype=torch.long),
        spacing=0.5 + torch.rand(count, 3, generator=draws),
        category=torch.arange(count) % 2,
        label_map=labels / labels.sum(1, keepdim=True),
    )


def small_config(
    names: tuple[Condition, ...] = CONDITIONS, path: PathName = "linear", shape: TransformerShape = SHAPE
) -> DiffusionConfig:
    return DiffusionConfig(
        latent_channels=2,
        latent_grid=(4, 6, 4),
        shape=shape,
        sizes=condition_sizes(NETWORK, names, maps=True, body_parts=1, categories=2, labels=3),
        path=path,
    )


def awake_transformer(
    names: tuple[Condition, ...] = CONDITIONS, path: PathName = "linear", seed: int = 0
) -> DiffusionTransformer:
    """A transformer as after training: nothing in it is zero."""
    model = DiffusionTransformer(small_config(names, path), seed=seed).requires_grad_(False)
    model.set_latent_scale(small_encoder().latent_mean, small_encoder().latent_deviation)
    draws = generator(seed)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return model.eval()
