import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from meduet_models.tokens import patchify, sincos_positions, unpatchify


@settings(max_examples=20, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    patch=st.integers(1, 3),
    channels=st.integers(1, 4),
)
def test_unpatchify_undoes_patchify(grid: tuple[int, int, int], patch: int, channels: int) -> None:
    latents = torch.randn(2, channels, *(size * patch for size in grid))

    tokens = patchify(latents, patch)

    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], channels * patch**3)
    assert torch.equal(unpatchify(tokens, grid, patch), latents)


def test_embedding_patches_is_the_published_strided_convolution() -> None:
    latents, weight = torch.randn(2, 4, 8, 12, 8), torch.randn(6, 4, 2, 2, 2)

    convolved = F.conv3d(latents, weight, stride=2).flatten(2).transpose(1, 2)

    torch.testing.assert_close(patchify(latents, 2) @ weight.flatten(1).T, convolved, rtol=1e-4, atol=1e-4)


def test_a_grid_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of the patch, 4"):
        patchify(torch.zeros(1, 4, 8, 10, 8), 4)


def test_no_two_positions_are_the_same_and_neighbours_are_nearest() -> None:
    table = sincos_positions((4, 6, 4), 96)
    distance = torch.cdist(table, table)

    assert distance.fill_diagonal_(9.0).min() > 0.5
    assert distance[0, 1] < distance[0, 2] < distance[0, 3]  # along the last axis


def test_width_that_is_no_multiple_of_six_leaves_zeros() -> None:
    table = sincos_positions((2, 2, 2), 64)

    assert torch.equal(table[:, 60:], torch.zeros(8, 4))
    with pytest.raises(ValueError, match="width of at least 6"):
        sincos_positions((2, 2, 2), 4)


def test_positions_within_the_grid_tell_its_tokens_further_apart() -> None:
    grid = (5, 6, 5)
    published, within = [sincos_positions(grid, 96, choice) for choice in (False, True)]
    assert within.abs().max() <= 1
    nearest = [
        (table[:, None] - table[None]).norm(dim=2).fill_diagonal_(torch.inf).min()
        for table in (published, within)
    ]
    assert nearest[1] > 1.5 * nearest[0]
    changing = [(table.std(0) > 0.2).sum() for table in (published, within)]
    assert changing[1] > 2 * changing[0]
