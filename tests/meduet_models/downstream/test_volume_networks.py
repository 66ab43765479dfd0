"""Segmenters on the volume: shapes, joined tokens, what is frozen, and one hash of what they start from."""

import pytest
import torch

from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.networks import predict, trained_keys
from meduet_models.downstream.starting import start_sha256, starting_network
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.meduet import FactorNetwork
from meduet_models.volume_unet import VolumeUNet
from tests.worlds import small_network

CONFIG = small_network(latent_grid=(4, 6, 4), width=16, depth=2)
VOLUMES = torch.rand(3, 1, 16, 24, 16, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(3, 2, 4, 6, 4, generator=torch.Generator().manual_seed(1))


def test_logits_lie_on_the_grid_of_the_volume_whatever_its_sides() -> None:
    network = VolumeSegmenter(VolumeUNet(), 3)
    assert network(VOLUMES).shape == (3, 3, 16, 24, 16)
    assert network(VOLUMES[:, :, :12, :21, :9]).shape == (3, 3, 12, 21, 9)


def test_a_joined_network_begins_as_the_u_net_alone_and_then_reads_its_tokens() -> None:
    alone = VolumeSegmenter(VolumeUNet(seed=2), 2, seed=4)
    joined = VolumeSegmenter(VolumeUNet(seed=2), 2, content=FactorNetwork(CONFIG), seed=4)
    own = {name: t for name, t in alone.head.state_dict().items()}
    joined.head.load_state_dict({**joined.head.state_dict(), **own})
    assert joined.reads_latents and not alone.reads_latents
    torch.testing.assert_close(joined(VOLUMES, LATENTS), alone(VOLUMES), rtol=0, atol=0)
    joined(VOLUMES, LATENTS).square().mean().backward()
    assert float(joined.head["join"].weight.grad.abs().max()) > 0
    with torch.no_grad():
        joined.head["join"].weight.normal_(generator=torch.Generator().manual_seed(0))
    changed = joined(VOLUMES, LATENTS.flip(2))
    assert not torch.allclose(changed, joined(VOLUMES, LATENTS))


@pytest.mark.parametrize("kind", ["volume_unet", "joined"])
def test_a_frozen_network_trains_its_head_alone(kind: NetworkKind) -> None:
    task, content = task_of("segmentation"), FactorNetwork(CONFIG)
    frozen = starting_network(task, kind, content, 2, trainable=False)
    assert {name.split(".")[0] for name in trained_keys(frozen)} == {"head"}
    whole = starting_network(task, kind, content, 2, trainable=True)
    assert {name.split(".")[0] for name in trained_keys(whole)} == {"head", "encoder"}


def test_one_hash_names_everything_that_a_network_starts_from_and_not_its_head() -> None:
    task, content, other = task_of("segmentation"), FactorNetwork(CONFIG), FactorNetwork(CONFIG, seed=1)

    def of(kind: NetworkKind, network: FactorNetwork, classes: int, seed: int) -> str:
        return start_sha256(starting_network(task, kind, network, classes, trainable=True, seed=seed))

    assert of("tokens", content, 2, 0) == of("tokens", content, 5, 1) != of("tokens", other, 2, 0)
    assert (
        of("volume_unet", content, 2, 0) == of("volume_unet", other, 5, 0) != of("volume_unet", content, 2, 1)
    )
    assert of("joined", content, 2, 0) != of("joined", other, 2, 0)
    assert len({of(kind, content, 2, 0) for kind in ("tokens", "volume_unet", "joined")}) == 3


def test_predictions_of_many_scans_are_those_of_each() -> None:
    network = VolumeSegmenter(VolumeUNet(), 2).eval()
    many = predict(network, VOLUMES.repeat(7, 1, 1, 1, 1).half())
    torch.testing.assert_close(many[:3], network(VOLUMES.half().float()), rtol=1e-4, atol=1e-4)
