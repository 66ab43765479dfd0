"""Grids, voxels and percentiles: MONAI's and NumPy's own, to the bit."""

import numpy as np
import pytest
import torch

from scans.resampling import percentiles, resample, spaced_grid


def draw(random: np.random.Generator, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """A windowed scan with zeros in it, and its affine: along the axes, or oblique."""
    array = random.random(random.integers(6, 24, 3)).astype(np.float32)
    array[array < random.choice([0.02, 0.6])] = 0.0
    affine = np.eye(4)
    if whole:
        affine[:3, :3] = np.eye(3)[random.permutation(3)] * random.choice([-1.0, 1.0], (3, 1))
        affine[:3, 3] = random.integers(-20, 20, 3)
    else:
        turned = np.linalg.qr(random.standard_normal((3, 3)))[0]
        affine[:3, :3] = turned * random.choice([0.7, 1.0, 1.3, 2.0], 3)
        affine[:3, 3] = random.uniform(-20, 20, 3)
    return array, affine


@pytest.mark.parametrize("seed", range(60))
def test_a_scan_on_another_grid_is_what_monai_makes_of_it_to_the_bit(seed: int) -> None:
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    random = np.random.default_rng(seed)
    array, affine = draw(random, whole=seed % 3 > 0)
    wanted = np.eye(4)
    if seed % 3 == 2:  # voxels coincide: copied here, interpolated there
        wanted[:3, :3] = np.eye(3)[random.permutation(3)] * random.choice([-1.0, 1.0], (3, 1))
    wanted[:3, 3] = np.round(affine[:3] @ [*(np.array(array.shape) // 2), 1]) - random.integers(2, 9, 3)
    shape = tuple(int(n) for n in random.integers(4, 30, 3))
    for mode in ("bilinear", "nearest"):
        theirs = SpatialResample(mode=mode, padding_mode="zeros", dtype=torch.float64)(
            MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(affine)),
            dst_affine=torch.from_numpy(wanted), spatial_size=shape,
        ).as_tensor()[0].to(torch.float32)  # fmt: skip
        ours = resample(torch.from_numpy(array), affine, wanted, shape, mode)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", range(40))
def test_the_grid_of_another_spacing_is_monais_to_the_bit(seed: int) -> None:
    from monai.data.utils import compute_shape_offset, zoom_affine

    random = np.random.default_rng(seed)
    array, affine = draw(random, whole=seed % 2 > 0)
    if seed % 4 == 0:
        affine[0, 1] += 0.2  # sheared
    spacing_mm = tuple(random.choice([0.5, 1.0, 1.5, 3.0], 3))
    theirs = zoom_affine(affine, spacing_mm, diagonal=False)
    shape, theirs[:3, 3] = compute_shape_offset(array.shape, affine, theirs)
    ours_shape, ours = spaced_grid(array.shape, affine, spacing_mm)
    assert ours_shape == tuple(shape) and np.array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(200))
def test_percentiles_are_numpys_to_the_bit(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.choice([1, 2, 3, 70, 999, 20_000]))
    values = {
        0: lambda: random.standard_normal(size),
        1: lambda: np.round(random.gamma(2.0, 100.0, size)),
        2: lambda: np.sort(random.random(size)),  # an even sample of what is sorted is sorted
        3: lambda: np.where(random.random(size) < 0.9, 0.0, 1e6 * random.random(size)),
    }[seed % 4]().astype(np.float32)
    low, high = sorted(random.choice([0.0, 0.5, 1.0, 25.0, 50.0, 99.5, 100.0, 33.3], 2))
    expected = np.percentile(values, (low, high))
    assert percentiles(values, (low, high)) == (float(expected[0]), float(expected[1]))
