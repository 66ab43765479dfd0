"""Augmentation: labels go where their voxels go, and every draw is the generator's."""

import torch

from meduet_models.downstream.augmentation import augmented


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    x, y, z = torch.meshgrid(*(torch.arange(float(n)) for n in (24, 32, 20)), indexing="ij")
    left = (x - 7).square() + (y - 20).square() + (z - 9).square() < 25
    right = (x - 16).square() + (y - 12).square() + (z - 9).square() < 25
    labels = left.long() + 2 * right.long()
    volumes = 0.2 + 0.5 * (labels > 0).float() + 0.2 * (labels == 2).float()
    return volumes.expand(6, 1, -1, -1, -1).clone(), labels.expand(6, 1, -1, -1, -1).clone()


def explained(volume: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the variance of a volume that its labels explain."""
    within = sum(
        float((part - part.mean()).square().sum()) for v in range(3) if len(part := volume[labels == v])
    )
    return 1 - within / float((volume - volume.mean()).square().sum())


def test_labels_move_with_their_voxels() -> None:
    volumes, labels = blobs()
    seen, placed, _ = augmented(volumes, labels, None, 1.0, torch.Generator().manual_seed(0))
    assert seen.shape == volumes.shape and placed.dtype == torch.long
    assert set(placed.unique().tolist()) == {0, 1, 2}
    for volume, before, after in zip(seen, labels, placed, strict=True):
        assert not torch.equal(before, after)
        assert explained(volume, after) > explained(volume, before) + 0.05


def test_left_stays_left() -> None:
    volumes, labels = blobs()
    for seed in range(5):
        _, placed, _ = augmented(volumes, labels, None, 1.0, torch.Generator().manual_seed(seed))
        for one in placed:
            x = torch.arange(24).reshape(1, -1, 1, 1).expand_as(one)
            assert float(x[one == 1].float().mean()) < float(x[one == 2].float().mean())


def test_the_same_generator_gives_the_same_and_every_scan_has_its_own_draw() -> None:
    volumes, labels = blobs()
    seen, placed, _ = augmented(volumes, labels, None, 1.0, torch.Generator().manual_seed(3))
    again, placed_again, _ = augmented(volumes, labels, None, 1.0, torch.Generator().manual_seed(3))
    assert torch.equal(seen, again) and torch.equal(placed, placed_again)
    assert all(not torch.equal(seen[0], other) for other in seen[1:])
    assert 0.0 <= float(seen.min()) and float(seen.max()) <= 1.0


def test_strength_zero_changes_last_digits_alone() -> None:
    volumes, labels = blobs()
    seen, placed, _ = augmented(volumes, labels, None, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen, volumes, rtol=0, atol=1e-4)
    assert torch.equal(placed, labels)


def test_latents_move_with_their_volume() -> None:
    volumes, labels = blobs()
    latents = torch.nn.functional.avg_pool3d(labels.float(), 4)
    _, placed, moved = augmented(volumes, labels, latents, 1.0, torch.Generator().manual_seed(1))
    assert moved is not None and moved.shape == latents.shape
    expected = torch.nn.functional.avg_pool3d(placed.float(), 4)
    assert float((moved - expected).square().mean()) < 0.5 * float((latents - expected).square().mean())
