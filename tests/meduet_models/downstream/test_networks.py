"""Downstream networks: shapes, what is frozen, where they start from."""

from typing import Any

import pytest
import torch

from meduet_models.downstream.networks import PretrainedNetwork, encoder_tensors, predict, trained_keys
from meduet_models.downstream.tasks import TASKS, task_of
from meduet_models.downstream.unet import SmallUNet
from meduet_models.meduet import FactorNetwork, MeDUET, NetworkConfig
from tests.worlds import small_network


def config(patch: int = 2, depth: int = 2, grid: tuple[int, int, int] = (4, 8, 4)) -> NetworkConfig:
    return small_network(
        latent_grid=grid, patch_size=patch, code_size=8, depth=depth, style_map_grid=(1, 1, 1)
    )


def with_head(network: FactorNetwork, task: str, classes: int, **settings: Any) -> PretrainedNetwork:
    return task_of(task).network(network, classes, **settings)


def latents(grid: tuple[int, int, int] = (4, 8, 4)) -> torch.Tensor:
    return torch.randn(3, 2, *grid, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("patch", "depth"), [(1, 1), (2, 2), (2, 5), (4, 3)])
def test_logits_lie_on_the_voxels_of_the_volume(patch: int, depth: int) -> None:
    grid = (4, 8, 4) if patch < 4 else (8, 8, 4)
    network = with_head(FactorNetwork(config(patch, depth, grid)), "segmentation", 5, trainable=True)
    assert network(latents(grid)).shape == (3, 5, *(4 * size for size in grid))


@pytest.mark.parametrize("task", TASKS)
def test_the_unet_has_the_shapes_of_the_others(task: str) -> None:
    other = with_head(FactorNetwork(config()), task, 3, trainable=True)
    assert SmallUNet(2, 3, per_voxel=task_of(task).per_voxel)(latents()).shape == other(latents()).shape


def test_the_unet_refuses_a_grid_that_one_halving_does_not_divide() -> None:
    with pytest.raises(ValueError, match="even latent grid"):
        SmallUNet(2, 3, per_voxel=True)(latents((4, 5, 4)))


@pytest.mark.parametrize("task", TASKS)
def test_a_frozen_encoder_trains_its_head_alone_and_every_parameter_has_a_gradient(task: str) -> None:
    for trainable in (False, True):
        network = with_head(FactorNetwork(config()), task, 3, trainable=trainable)
        network(latents()).square().sum().backward()
        trained = trained_keys(network)
        assert any(name.startswith("encoder.") for name in trained) is trainable
        assert all((p.grad is not None) == (n in trained) for n, p in network.named_parameters())


def test_content_is_that_of_the_pretrained_network() -> None:
    pretrained = MeDUET(config(), 2, seed=3).eval()
    pretrained.set_erasure(torch.full((12,), 0.5), torch.diag(torch.arange(12.0)))
    network = with_head(pretrained, "classification", 3, trainable=False)
    content, _ = network.encoder(latents())
    torch.testing.assert_close(content, pretrained.content_tokens(latents()), rtol=0, atol=0)


def test_the_given_network_is_copied_and_stays_whole() -> None:
    pretrained = FactorNetwork(config())
    before = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    network = with_head(pretrained, "segmentation", 3, trainable=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert pretrained.encode(latents()).content.shape == (3, 16, 12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pretrained.state_dict().items())


def test_style_and_decoder_are_left_out() -> None:
    names = encoder_tensors(with_head(MeDUET(config(), 2), "segmentation", 3, trainable=True).state_dict())
    parts = {name.split(".")[2] for name in names}
    assert parts == {"embed", "encoder", "content_head", *FactorNetwork.CONSTANTS}


def test_a_head_starts_from_its_seed_and_moves_no_global_generator() -> None:
    before = torch.get_rng_state()
    pretrained = FactorNetwork(config())
    torch.set_rng_state(before)
    starts = []
    for seed in (1, 1, 2):
        network = with_head(pretrained, "segmentation", 3, trainable=True, seed=seed)
        starts.append(network.head["predict"].weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_predicting_many_is_predicting_each() -> None:
    network = SmallUNet(2, 3, per_voxel=True).eval()
    many = latents().repeat(7, 1, 1, 1, 1)
    torch.testing.assert_close(predict(network, many)[18:], predict(network, many[18:]))
