from collections.abc import Iterator

import pytest
import torch
from torch import nn

from meduet_models.adamw import AdamW, decay_groups
from meduet_models.meduet import MeDUET
from meduet_models.muon import MATRIX_RATE, Muon, equalised
from tests.worlds import small_network

NETWORK = small_network(latent_grid=(4, 4, 6), style_map_grid=(1, 2, 1))
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 1e-2}


def gradients(network: nn.Module, seed: int) -> Iterator[torch.Tensor]:
    """A gradient of every parameter, drawn."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        yield torch.randn(parameter.shape, generator=generator)


def stepped(optimiser: AdamW, network: nn.Module, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The parameters after two steps."""
    for seed in (1, 2):
        for parameter, gradient in zip(network.parameters(), gradients(network, seed), strict=True):
            parameter.grad = scale * gradient
        optimiser.step()
        optimiser.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("shape", [(12, 12), (48, 12), (12, 48), (3, 12, 12)])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = equalised(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3  # those of `matrix` differ tenfold and more
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ found @ v.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_what_is_no_matrix_of_the_content_branch_steps_as_adamw_does() -> None:
    ours, theirs = MeDUET(NETWORK, 2, seed=1), MeDUET(NETWORK, 2, seed=1)
    muon = Muon.of(ours, **SETTINGS)
    adamw = AdamW(decay_groups(theirs.parameters(), 1e-2), lr=1e-3, betas=(0.9, 0.95), fused=True)
    after, plain = stepped(muon, ours), stepped(adamw, theirs)
    changed = {name for name in after if not torch.equal(after[name], plain[name])}
    matrices = {
        *(f"{part}.blocks.0.{layer}.weight" for part in ("encoder", "decoder")
          for layer in ("qkv", "proj", "expand", "contract")),
        "content_head.linear.weight", "fuse.linear.weight", "decoder.narrow.weight",
    }  # fmt: skip
    assert changed == matrices


def test_a_step_of_a_matrix_is_as_long_whatever_the_gradient() -> None:
    small, large = MeDUET(NETWORK, 2, seed=1), MeDUET(NETWORK, 2, seed=1)
    one = stepped(Muon.of(small, **SETTINGS), small)
    other = stepped(Muon.of(large, **SETTINGS), large, scale=1000.0)
    start = MeDUET(NETWORK, 2, seed=1).state_dict()
    name = "encoder.blocks.0.proj.weight"
    torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)
    length = (one[name] - start[name]).norm() / (MATRIX_RATE * 1e-3 * 12**0.5)
    assert 0.7 < length < 2.0  # one to two steps, each of length one for each of 12 singular values


def test_queries_keys_and_values_are_turned_apart() -> None:
    network = MeDUET(NETWORK, 2, seed=1)
    optimiser, weight = Muon.of(network, **SETTINGS), network.encoder.blocks[0].qkv.weight
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad[:12] *= 1e-3  # queries hardly have a gradient
    optimiser.step()
    moved = (weight.detach() - before).reshape(3, 12, 12).norm(dim=(1, 2))
    assert moved.max() < 1.5 * moved.min()


def test_a_matrix_without_a_gradient_stays_and_keeps_nothing() -> None:
    network = MeDUET(NETWORK, 2, seed=1)
    optimiser, before = Muon.of(network, **SETTINGS), network.state_dict()["fuse.linear.weight"].clone()
    optimiser.step()
    assert torch.equal(network.fuse.linear.weight, before)
    assert network.fuse.linear.weight not in optimiser.state
