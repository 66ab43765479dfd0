"""Whole volumes: the box around the foreground, on the crop's own grid, the same by slabs as at once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scans import whole_volumes
from scans.scans import Reason, Scan, UnusableScan, accept, accept_label
from scans.volume_plan import VolumePlan
from scans.volumes import lay_back, prepare
from scans.whole_volumes import lay_back_whole, part_of, prepare_whole, volume_at

PLAN = VolumePlan(
    modality="ct", window="ct_hu", ct_window_hu=(-1000.0, 1000.0), spacing_mm=(2.0, 2.0, 2.0),
    shape=(16, 16, 16), extent="scan", registered=False,
)  # fmt: skip
CROP = replace(PLAN, extent="crop")
OBLIQUE = np.array([[-1.9, 0.2, 0, 40], [0.2, 1.8, 0.1, -50], [0, -0.1, 2.2, 7], [0, 0, 0, 1]])
STRIDE = 4


def body(
    shape: tuple[int, int, int] = (50, 44, 38),
    at: tuple[int, int, int] = (6, 9, 5),
    sides: tuple[int, int, int] = (31, 28, 24),
    affine: np.ndarray = OBLIQUE,
) -> Scan:
    """Air, noisy, with a block of tissue."""
    random = np.random.default_rng(0)
    values = -1000 + 20 * random.random(shape)
    block = tuple(slice(a, a + n) for a, n in zip(at, sides, strict=True))
    values[block] = 100 * random.random(sides)
    return accept(values.astype(np.float32), affine)


def test_all_of_the_foreground_is_in_the_box_and_most_of_the_air_is_not() -> None:
    scan = body()
    made = prepare_whole(scan, PLAN, STRIDE)
    array, affine = lay_back_whole(made.volume, made.geometry)
    assert np.allclose(affine, scan.affine) and array.shape == scan.array.shape
    tissue = scan.array > -500
    inner = np.zeros_like(tissue)
    inner[8:35, 11:35, 7:27] = True  # two voxels within the block: its faces are blurred by resampling
    assert (array[inner] > 0.4).all()
    laid, _ = lay_back_whole(torch.ones_like(made.volume), made.geometry)
    assert (laid[tissue] > 0.99).all(), "no foreground is lost"
    assert (laid < 0.5).sum() > 0.3 * laid.size, "the box is not the whole scan"
    assert made.foreground.shape == tuple(side // STRIDE for side in made.volume.shape[1:])


def test_a_voxel_lies_in_the_same_place_of_the_same_cell_in_a_crop_and_in_the_whole() -> None:
    scan = body()
    made, crop = prepare_whole(scan, PLAN, STRIDE), prepare(scan, CROP)
    inverse = np.linalg.inv(made.geometry.prepared_affine)
    first = (inverse @ crop.geometry.prepared_affine)[:3, 3]
    assert np.allclose(first / STRIDE, np.rint(first / STRIDE), atol=1e-6), "in whole cells"
    start = np.rint(first).astype(int)
    inside = tuple(slice(a, a + n) for a, n in zip(start, PLAN.shape, strict=True))
    torch.testing.assert_close(made.volume[:, *inside], crop.volume, rtol=0, atol=1e-6)


@pytest.mark.parametrize("view", [0, 1, 2])
def test_slabs_make_what_one_piece_makes(monkeypatch: pytest.MonkeyPatch, view: int) -> None:
    scan = body()
    label = accept_label((scan.array > -500).astype(np.float32) * 3, scan.affine)
    whole = prepare_whole(scan, PLAN, STRIDE, view, label)
    back = lay_back(whole.volume, whole.geometry)[0]
    monkeypatch.setattr(whole_volumes, "SLAB_VOXELS", 5000)
    slabs = prepare_whole(scan, PLAN, STRIDE, view, label)
    torch.testing.assert_close(slabs.volume, whole.volume, rtol=0, atol=1e-6)
    assert torch.equal(slabs.foreground, whole.foreground)
    assert slabs.label is not None and whole.label is not None
    assert (slabs.label == whole.label).float().mean() > 0.9999 and slabs.label.max() == 3
    assert np.allclose(lay_back_whole(whole.volume, whole.geometry)[0], back, atol=1e-6)


def test_a_scan_smaller_than_the_networks_grid_is_amid_background() -> None:
    small = body((12, 10, 9), (2, 2, 2), (8, 6, 5), np.diag([2.0, 2.0, 2.0, 1.0]))
    made = prepare_whole(small, PLAN, STRIDE)
    assert tuple(made.volume.shape[1:]) == PLAN.shape
    assert not made.volume[0, 0].any(), "beyond the scan there is nothing"
    assert made.foreground.any()


def test_a_single_bright_voxel_is_no_foreground_and_a_scan_without_any_says_so() -> None:
    scan = body()
    array = scan.array.copy()
    array[48, 42, 36] = 900.0  # a speck in the far corner
    speck = accept(array, scan.affine)
    assert prepare_whole(speck, PLAN, STRIDE).volume.shape == prepare_whole(scan, PLAN, STRIDE).volume.shape
    air = np.where(scan.array > -900, -950, scan.array).astype(np.float32)
    with pytest.raises(UnusableScan) as refused:
        prepare_whole(accept(air, scan.affine), PLAN, STRIDE)
    assert refused.value.reason is Reason.NO_FOREGROUND


def test_a_volume_is_made_again_where_a_geometry_says() -> None:
    scan = body()
    crop, whole = prepare(scan, CROP), prepare_whole(scan, PLAN, STRIDE)
    assert torch.equal(volume_at(scan, CROP, crop.geometry), crop.volume)
    part = part_of(whole.geometry, (4, 8, 4), (8, 12, 16))
    expected = whole.volume[:, 4:12, 8:20, 4:20]
    torch.testing.assert_close(volume_at(scan, PLAN, part), expected, rtol=0, atol=1e-6)
