"""A whole generative model of random weights and two sites' styles: enough for the plumbing around it."""

import dataclasses
from typing import Any

import torch

from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditioner import condition_sizes
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import Tokenizer, pca_tokenizer
from scans.volume_plan import VolumePlan
from tests.meduet_models.diffusion.small_models import (
    NETWORK,
    awake_transformer,
    small_config,
    small_encoder,
    small_latents,
)

SITES = ("north", "south", "west")  # west has told no style
VOLUMES = VolumePlan(modality="mr", shape=(16, 24, 16), spacing_mm=(2.0, 2.0, 2.0))


def small_tokenizer() -> Tokenizer:
    draws = torch.Generator().manual_seed(0)
    return pca_tokenizer(PatchMoments.of(torch.rand(4, 1, 16, 16, 16, generator=draws)), 2)


def small_model(tokenizer: Tokenizer, **changes: Any) -> GenerativeModel:
    """Told content, style, body part, spacing and class; policy `federated` unless changed."""
    layout = StyleLayout(channels=2, latent_grid=(4, 6, 4), map_grid=NETWORK.style_map_grid, bound=10.0)
    moments = {
        site: StyleMoments.of((1 + i) * small_latents(3, i), list("xyz"), layout)
        for i, site in enumerate(SITES[:2])
    }
    names = ("content", "style", "body_part", "spacing", "category")
    parts: dict[str, Any] = {
        "transformer": awake_transformer(names),
        "encoder": small_encoder(),
        "bank": StyleBank.of(SITES, moments),
        "sites": SITES,
        "directions": {"age": torch.linspace(-0.1, 0.1, 24).expand(12, 24)},
        "tokenizer_sha256": tokenizer.sha256,
        "volumes": dataclasses.asdict(VOLUMES),
        "body_parts": ("head",),
        "categories": ("ill", "well"),
        "policy": "federated",
        "patient_data": False,
        "provenance": {},
    }
    return GenerativeModel(**parts | changes)


def models_of_whole_scans() -> dict[str, Any]:
    """The parts of `small_model` that differ where crops come from anywhere: no maps, one centre."""
    names = ("content", "style", "spacing")
    layout = StyleLayout(channels=2, latent_grid=(4, 6, 4), map_grid=None, bound=10.0)
    moments = {
        site: StyleMoments.of((1 + i) * small_latents(3, i), list("xyz"), layout)
        for i, site in enumerate(SITES[:2])
    }
    encoder = small_encoder()
    centre = encoder.latent_mean.mean((1, 2, 3), keepdim=True).expand(-1, 4, 6, 4)
    encoder.set_latent_scale(centre, encoder.latent_deviation)
    sizes = condition_sizes(NETWORK, names, maps=False, body_parts=1, categories=2, labels=3)
    config = dataclasses.replace(small_config(), sizes=sizes)
    transformer = DiffusionTransformer(config, seed=0).requires_grad_(False)
    transformer.set_latent_scale(encoder.latent_mean, encoder.latent_deviation)
    draws = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return {
        "transformer": transformer.eval(),
        "encoder": encoder,
        "bank": StyleBank.of(SITES, moments),
        "body_parts": (),
        "categories": (),
    }
