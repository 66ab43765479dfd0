"""Baselines: laws of what they read, and what they recover."""

import pytest
import torch

from meduet_models.downstream.baselines import PlainVolumeUNet, fit_per_position, mean_label
from meduet_models.probes.hidden import with_neighbours

GRID = (2, 3, 2)


def names(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def planted(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of two numbers, whose first decides the class of the token's 2³ voxels."""
    tokens = torch.randn(count, 12, 2, generator=torch.Generator().manual_seed(seed))
    labels = (tokens[..., :1].transpose(1, 2).reshape(count, 1, *GRID) > 0).long()
    for axis in (2, 3, 4):
        labels = labels.repeat_interleave(2, dim=axis)
    return tokens, labels


def test_the_mean_label_is_shares_of_classes_or_the_mean_number() -> None:
    maps = torch.tensor([0, 1, 1, 2]).reshape(4, 1, 1, 1, 1).expand(4, 1, 2, 2, 2)
    assert mean_label(maps, 3).shape == (3, 2, 2, 2)
    assert mean_label(maps, 3)[:, 0, 0, 0].tolist() == [0.25, 0.5, 0.25]
    assert mean_label(torch.tensor([0, 1, 1, 1]), 2).tolist() == [0.25, 0.75]
    assert mean_label(torch.tensor([0.5, -0.5, 1.5]), 1).tolist() == [0.5]


def test_ridge_per_position_recovers_planted_labels_at_their_own_place() -> None:
    fit = fit_per_position(*planted(80, 0), 2, GRID, names(80), 0)
    tokens, labels = planted(40, 1)
    right = (fit(tokens).argmax(1, keepdim=True) == labels).double().mean()
    assert float(right) > 0.93
    moved = tokens.roll(1, dims=1)
    assert float((fit(moved).argmax(1, keepdim=True) == labels).double().mean()) < 0.6


def test_a_voxel_that_is_of_one_class_in_training_keeps_it() -> None:
    tokens, labels = planted(20, 0)
    labels[:, :, 0, 0, 0] = 1
    scores = fit_per_position(tokens, labels, 2, GRID, names(20), 0)(planted(5, 1)[0])
    assert bool((scores[:, 1, 0, 0, 0] > 0.99).all())
    torch.testing.assert_close(scores.sum(1), torch.ones_like(scores[:, 0]))


def test_labels_that_are_no_whole_cubes_of_tokens_are_refused() -> None:
    tokens, labels = planted(4, 0)
    with pytest.raises(ValueError, match="whole cubes"):
        fit_per_position(tokens, labels[..., :3], 2, GRID, names(4), 0)


def test_neighbours_are_the_26_around_and_zeros_beyond_the_border() -> None:
    tokens = torch.arange(1.0, 13.0).reshape(1, 12, 1)
    around = with_neighbours(tokens, GRID).reshape(12, 27)
    assert torch.equal(around[:, 13], tokens[0, :, 0])
    assert int((around[0] > 0).sum()) == 8  # a corner of the grid: itself and seven
    assert around[0, 14] == 2.0 and around[0, 12] == 0.0


@pytest.mark.parametrize("per_voxel", [True, False])
def test_the_u_net_on_the_volume_starts_from_its_seed_and_answers_as_asked(per_voxel: bool) -> None:
    volumes = torch.rand(2, 1, 8, 12, 8)
    one, same, other = (PlainVolumeUNet(3, per_voxel=per_voxel, seed=s).eval()(volumes) for s in (1, 1, 2))
    assert one.shape == ((2, 3, 8, 12, 8) if per_voxel else (2, 3))
    assert torch.equal(one, same) and not torch.equal(one, other)
