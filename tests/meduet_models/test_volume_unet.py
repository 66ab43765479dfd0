"""The U-Net on the volume: its start, what it ignores, and what its stem keeps."""

import pytest
import torch
from monai.networks.utils import pixelshuffle

from meduet_models.volume_unet import (
    STEM,
    WIDTHS,
    VolumeUNet,
    deepest_grid,
    depth_to_space,
    padded,
    space_to_depth,
)


def test_weights_follow_from_the_seed_alone() -> None:
    first = VolumeUNet(seed=3).state_dict()
    before = torch.random.get_rng_state()
    torch.rand(5)
    again, other = VolumeUNet(seed=3).state_dict(), VolumeUNet(seed=4).state_dict()
    torch.random.set_rng_state(before)
    VolumeUNet(seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_it_has_less_than_a_million_weights() -> None:
    assert 850_000 < sum(p.numel() for p in VolumeUNet().parameters()) < 1_000_000


def test_gain_and_offset_of_a_scanner_change_nothing() -> None:
    network = VolumeUNet()
    volumes = torch.rand(2, 1, 16, 8, 24, generator=torch.Generator().manual_seed(0))
    seen = network(volumes)
    assert seen.shape == (2, WIDTHS[0], 8, 4, 12)
    torch.testing.assert_close(network(0.3 * volumes + 0.2), seen, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(network(volumes.square()), seen, rtol=1e-3, atol=1e-4)


def test_the_stem_loses_nothing() -> None:
    volumes = torch.rand(2, 1, 8, 12, 4)
    assert torch.equal(depth_to_space(space_to_depth(volumes), STEM), volumes)


@pytest.mark.parametrize(("channels", "edge"), [(8, 2), (3 * 64, 4)])
def test_the_shuffle_is_monais(channels: int, edge: int) -> None:
    x = torch.rand(2, channels, 2, 3, 1)
    assert torch.equal(depth_to_space(x, edge), pixelshuffle(x, 3, edge))


def test_sides_that_the_levels_do_not_divide_are_refused_and_padding_makes_them_whole() -> None:
    volumes = torch.rand(1, 1, 12, 16, 8)
    with pytest.raises(ValueError, match=r"multiples of 8; got \(12, 16, 8\)"):
        VolumeUNet()(volumes)
    whole = padded(volumes)
    assert whole.shape[2:] == (16, 16, 8) and torch.equal(whole[:, :, :12], volumes)
    assert deepest_grid((12, 16, 8)) == (2, 2, 1)
    assert padded(whole) is whole


def test_what_is_told_at_the_deepest_level_reaches_the_output() -> None:
    network = VolumeUNet()
    volumes = torch.rand(1, 1, 16, 16, 16)
    nothing = torch.zeros(1, WIDTHS[-1], *deepest_grid((16, 16, 16)))
    assert torch.equal(network(volumes, nothing), network(volumes))
    assert not torch.equal(network(volumes, nothing + 1), network(volumes))
