"""Noise measured on a scan alone, and its share of the latents."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from meduet_models.tokenizer.patch_pca import PatchMoments
from meduet_models.tokenizer.tokenizer import pca_tokenizer
from server.tokenizer.noise import NoiseShare, noise_deviation, noise_floor_db


def smooth(seed: int, sides: tuple[int, int, int] = (32, 32, 32)) -> Tensor:
    coarse = torch.rand(1, 1, 5, 5, 5, generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * functional.interpolate(coarse, size=sides, mode="trilinear", align_corners=True)[0]


def noise(volume: Tensor, deviation: float, seed: int = 1) -> Tensor:
    return deviation * torch.randn(volume.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("deviation", [0.01, 0.03, 0.08])
def test_the_deviation_of_noise_on_anatomy_is_found_also_where_windowing_cut_it(deviation: float) -> None:
    volume = smooth(0)
    volume[:, :12] = 0.0  # air, whose noise lies half below 0
    noisy = (volume + noise(volume, deviation)).clamp(0.0, 1.0)
    assert noise_deviation(noisy) == pytest.approx(deviation, rel=0.1)


def test_a_mask_and_a_smooth_scan_have_none() -> None:
    assert noise_deviation((smooth(0) > 0.5).float()) == 0.0
    assert noise_deviation(smooth(0)) < 0.001


def test_the_floor_is_the_psnr_of_what_lost_the_noise_alone() -> None:
    volume = smooth(2)
    lost = noise(volume, 0.03)
    psnr_db = -10 * math.log10(float(lost.square().mean()))
    assert noise_floor_db(noise_deviation(volume + lost)) == pytest.approx(psnr_db, abs=0.5)
    assert noise_floor_db(0.0) == math.inf


def test_the_share_of_noise_is_the_latents_variance_that_noise_adds() -> None:
    clean, deviation = smooth(3), 0.05
    tokenizer = pca_tokenizer(PatchMoments.of(torch.stack([clean + noise(clean, deviation, 4)])), 8)
    noisy = clean + noise(clean, deviation, 5)
    share = NoiseShare()
    share.add(noisy, deviation, tokenizer)
    overall, largest = share.shares()
    without, latents = tokenizer.encode(torch.stack([clean, noisy])).flatten(2)  # c, positions
    truth = (latents - without).square().mean() / latents.var(1, correction=0).mean()
    assert overall == pytest.approx(float(truth), rel=0.1)
    assert largest > 3 * overall  # the last components of so smooth a volume hold little but noise
