"""The fixed network: the same numbers for everyone, that see appearance and shape."""

import pytest
import torch
from torch import Tensor

from meduet_models.random_features import NUM_FEATURES, network, random_features
from meduet_models.weights import sha256_of_tensors


def blobs(count: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 1, 6, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(24, 24, 24), mode="trilinear")


def test_the_network_is_the_one_that_was_published() -> None:
    assert sha256_of_tensors(network()) == "d42255807ba635528a5e5f1fad6564ce841206b88d0ae9014632d1f586c864f3"


def test_features_are_finite_different_and_the_same_in_any_batch() -> None:
    volumes = blobs(20)
    features = random_features(volumes)
    assert features.shape == (20, NUM_FEATURES)
    torch.testing.assert_close(features[:1], random_features(volumes[:1]))
    assert int((features.std(0) > 1e-4).sum()) == NUM_FEATURES


def test_a_blur_a_contrast_and_another_anatomy_are_all_seen() -> None:
    volumes = blobs(16)
    spread = random_features(volumes).std(0)
    noise = torch.randn(volumes.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool3d(volumes, 3, 1, 1)
    for changed in (blurred, volumes**1.5, volumes + 0.05 * noise, blobs(16, seed=9) * 0.8):
        moved = (random_features(changed) - random_features(volumes)).mean(0).abs() / spread
        assert float(moved.max()) > 0.5


def test_intensities_outside_the_range_are_clipped() -> None:
    volumes = blobs(2) * 3 - 1
    torch.testing.assert_close(random_features(volumes), random_features(volumes.clamp(0, 1)))


def test_a_volume_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="16 voxels or more"):
        random_features(torch.zeros(1, 1, 12, 24, 24))
