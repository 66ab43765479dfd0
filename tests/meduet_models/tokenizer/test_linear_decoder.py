"""The best linear decoder of 27 latents: from sums, at least as good as any other."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from meduet_models.tokenizer.linear_decoder import NEIGHBOURS, NeighbourMoments, best_decoder
from meduet_models.tokenizer.patch_pca import PatchMoments, PatchPCA, principal_components, to_patches

CHANNELS = 3


def volumes(seed: int, count: int) -> Tensor:
    """Smooth-ish random volumes: noise averaged over neighbours."""
    noise = torch.rand(count, 1, 16, 20, 12, generator=torch.Generator().manual_seed(seed))
    return functional.avg_pool3d(noise, 5, stride=1, padding=2)


def pca(x: Tensor) -> PatchPCA:
    codec = PatchPCA(CHANNELS)
    codec.start_from(principal_components(PatchMoments.of(x), CHANNELS))
    return codec


def error_of(kernel: Tensor, bias: Tensor, latents: Tensor, patches: Tensor) -> float:
    return float(
        (functional.conv3d(latents, kernel.float(), bias.float(), padding=1) - patches).square().mean()
    )


def test_moments_of_two_sets_add_up_to_those_of_their_union() -> None:
    x = volumes(0, 5)
    latents, patches = pca(x).posterior_mean(x), to_patches(x)
    union = NeighbourMoments.of(latents, patches)
    added = NeighbourMoments.of(latents[:2], patches[:2]) + NeighbourMoments.of(latents[2:], patches[2:])
    torch.testing.assert_close(added.products, union.products)
    torch.testing.assert_close(added.patches, union.patches)
    assert float(union.products[-1, -1]) == 5 * 4 * 5 * 3
    assert len(union.products) == NEIGHBOURS * CHANNELS + 1


def test_a_convolution_that_made_the_patches_is_found_again() -> None:
    latents = torch.randn(6, 2, 5, 6, 4, generator=torch.Generator().manual_seed(1))
    made = nn.Conv3d(2, 64, 3, padding=1)
    with torch.no_grad():
        kernel, bias = best_decoder(NeighbourMoments.of(latents, made(latents)), 1e-4)
    assert made.bias is not None
    torch.testing.assert_close(kernel.float(), made.weight.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(bias.float(), made.bias.detach(), rtol=0, atol=1e-4)


def test_it_beats_the_decoder_of_one_latent_and_no_nearby_decoder_beats_it() -> None:
    x, fresh = volumes(2, 20), volumes(3, 20)
    codec = pca(x)
    latents, patches = codec.posterior_mean(x), to_patches(x)
    kernel, bias = best_decoder(NeighbourMoments.of(latents, patches), 1e-4)
    best = error_of(kernel, bias, latents, patches)
    draws = torch.Generator().manual_seed(4)
    for _ in range(5):
        other = kernel + 0.01 * kernel.std() * torch.randn(kernel.shape, generator=draws)
        assert error_of(other, bias, latents, patches) > best
    held_out = codec.posterior_mean(fresh)
    alone = float((codec.reconstruct(held_out) - fresh).square().mean())
    assert error_of(kernel, bias, held_out, to_patches(fresh)) < 0.95 * alone


def test_fitted_for_noisy_latents_it_is_the_better_decoder_of_them() -> None:
    x, deviation = volumes(5, 40), 0.5
    latents, patches = pca(x).posterior_mean(x), to_patches(x)
    moments = NeighbourMoments.of(latents, patches)
    noisy = latents + deviation * torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))
    careless, careful = (error_of(*best_decoder(moments, d), noisy, patches) for d in (1e-4, deviation))
    assert careful < 0.9 * careless
