"""A plan whose encoder is a U-Net on the volume: what it contradicts, and what its start must say."""

import dataclasses
from typing import Any

import pytest
import torch

from federation.exchanges.pretraining import LEVELS, start_sha256
from federation.plan.plan import RunPlan
from tests.worlds import small_network, small_plan

VOLUME_UNET = small_network(encoder="volume_unet")


def of_config(*settings: str) -> RunPlan:
    from server.config import compose_config, plain, plan_from

    return plan_from(
        plain(compose_config([*settings, "network.encoder=volume_unet"])),
        sites=("a", "b", "c"),
        tokenizer_sha256="0" * 64,
        latent_channels=4,
        stride=4,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anatomy_start": "shapes", "anatomy_sha256": "1" * 64}, "has no effect with network.encoder=vit"),
        ({"network": VOLUME_UNET, "anatomy_start": "shapes"}, "Expected anatomy_sha256"),
        ({"network": VOLUME_UNET, "anatomy_sha256": "1" * 64}, "Expected anatomy_sha256"),
    ],
)
def test_a_start_that_cannot_be_is_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_plan(**changes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("privacy=full",), "privacy.level=full cuts gradients of linear layers"),
        (
            ("diffusion=raw", "diffusion.training.start=encoder"),
            "A diffusion model has the encoder's blocks and no U-Net",
        ),
    ],
)
def test_what_cannot_work_with_convolutions_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        of_config(*settings)


@pytest.mark.parametrize("settings", [("privacy=sums",), ("privacy=adapters",), ("diffusion=raw",), ()])
def test_all_else_goes_with_it(settings: tuple[str, ...]) -> None:
    assert of_config(*settings).network.encoder == "volume_unet"


def test_the_hash_of_a_start_is_that_of_what_travels() -> None:
    weights = {f"{LEVELS}a.weight": torch.randn(8, 8), "embed.weight": torch.randn(3)}
    told = start_sha256(weights, "mxint8")
    from federation.wire.wire import rounded

    came = {name: rounded(tensor, "mxint8") for name, tensor in weights.items()}
    assert start_sha256(came, "mxint8") == told != start_sha256(weights, "float32")
    assert start_sha256({**weights, "embed.weight": torch.zeros(3)}, "mxint8") == told


def test_a_plan_keeps_the_hash_of_its_start() -> None:
    plan = small_plan(network=VOLUME_UNET, anatomy_start="canonical", anatomy_sha256="1" * 64)
    assert RunPlan.from_json(plan.to_json()) == plan
    assert dataclasses.replace(plan, anatomy_sha256="2" * 64).sha256 != plan.sha256
