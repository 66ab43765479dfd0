"""Patches, their sums, and their principal components."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meduet_models.tokenizer.patch_pca import (
    PATCH_VOXELS,
    PatchMoments,
    PatchPCA,
    from_patches,
    principal_components,
    to_patches,
)


def volumes(seed: int, count: int = 3, shape: tuple[int, int, int] = (8, 12, 16)) -> Tensor:
    """Smooth-ish random volumes: noise averaged over neighbours."""
    noise = torch.rand(count, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)


def test_patches_laid_side_by_side_are_the_volume() -> None:
    assert torch.equal(from_patches(to_patches(volumes(0))), volumes(0))


def test_a_patch_holds_a_cube_of_neighbours() -> None:
    x = volumes(1)
    assert torch.equal(to_patches(x)[0, :, 1, 2, 3], x[0, 0, 4:8, 8:12, 12:16].reshape(-1))


def test_sides_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        to_patches(torch.zeros(1, 1, 8, 10, 8))


@given(st.integers(0, 100), st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_the_components_of_summed_moments_are_those_of_the_pooled_patches(
    seed: int, site_sizes: list[int]
) -> None:
    sites = [volumes(seed + i, count) for i, count in enumerate(site_sizes)]
    vector = sum(
        (PatchMoments.of(site).to_vector() for site in sites[1:]), PatchMoments.of(sites[0]).to_vector()
    )
    summed = principal_components(PatchMoments.from_vector(vector), 8)
    pooled = to_patches(torch.cat(sites)).double().movedim(1, -1).reshape(-1, PATCH_VOXELS)
    centred = pooled - pooled.mean(0)
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(summed.mean, pooled.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed.variances, singular[:8] ** 2 / len(pooled), rtol=1e-9, atol=1e-12)
    # the same subspace, whatever the signs: projectors agree
    torch.testing.assert_close(summed.basis.T @ summed.basis, right[:8].T @ right[:8], rtol=0.0, atol=1e-8)


def test_moments_of_two_sites_are_the_moments_of_their_union() -> None:
    a, b = volumes(2), volumes(3, 5)
    added = PatchMoments.of(a) + PatchMoments.of(b)
    torch.testing.assert_close(
        added.to_vector(), PatchMoments.of(torch.cat([a, b])).to_vector(), rtol=1e-12, atol=1e-12
    )


def test_the_vector_holds_the_moments_exactly() -> None:
    moments = PatchMoments.of(volumes(4))
    again = PatchMoments.from_vector(moments.to_vector())
    assert again.count == moments.count
    assert torch.equal(again.total, moments.total)
    assert torch.equal(again.products, moments.products)
    with pytest.raises(ValueError, match="4161"):
        PatchMoments.from_vector(moments.to_vector()[:-1])


def test_the_signs_of_components_do_not_depend_on_which_site_computes_them() -> None:
    moments = PatchMoments.of(volumes(5, 6))
    scrambled = PatchMoments.from_vector(moments.to_vector() * 3)  # three times the same patches
    torch.testing.assert_close(
        principal_components(scrambled, 6).basis, principal_components(moments, 6).basis, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize(("channels", "count"), [(0, 3), (65, 3), (50, 1)])
def test_more_components_than_patches_or_voxels_are_refused(channels: int, count: int) -> None:
    moments = PatchMoments.of(volumes(6, count, (8, 8, 8)))
    with pytest.raises(ValueError, match="Expected"):
        principal_components(moments, channels)


def test_more_channels_never_reconstruct_worse_and_all_of_them_lose_nothing() -> None:
    x = volumes(7, 8)
    errors = []
    for channels in (1, 4, 16, 64):
        codec = PatchPCA(channels)
        codec.start_from(principal_components(PatchMoments.of(x), channels))
        errors.append(float((codec.reconstruct(codec.posterior_mean(x)) - x).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_the_error_of_a_truncated_basis_is_the_variance_left_out() -> None:
    x = volumes(8, 8)
    everything = principal_components(PatchMoments.of(x), 64).variances
    codec = PatchPCA(4)
    codec.start_from(principal_components(PatchMoments.of(x), 4))
    error = (codec.reconstruct(codec.posterior_mean(x)) - x).square().mean()
    assert float(error) == pytest.approx(float(everything[4:].sum()) / PATCH_VOXELS, rel=1e-3)
