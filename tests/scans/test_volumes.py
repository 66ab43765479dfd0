"""Scan to volume and back: laws over random oblique, sheared, flipped, anisotropic grids.

A scan whose values are a linear function of world coordinates is the measuring rod: linear interpolation
keeps such a function exactly, so every prepared voxel must hold the value of the place where its affine says
it lies.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, ResizeWithPadOrCrop, Spacing

from scans.scans import Scan, accept, accept_label
from scans.volume_plan import VolumePlan
from scans.volumes import Geometry, draw_view, intensity_range, lay_back, prepare, same_grid

PLAN = VolumePlan(modality="any", window="ct_hu", ct_window_hu=(-1000.0, 1000.0), spacing_mm=(2.0, 1.5, 2.5),
                  shape=(16, 20, 12))  # fmt: skip
SLOPES = np.array([3.0, -2.0, 1.5])


def random_affine(seed: int, shear: float = 0.3) -> np.ndarray:
    """Oblique, flipped, anisotropic and (unless `shear` is 0) sheared."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    sheared = np.eye(3) + shear * np.triu(generator.uniform(-1, 1, (3, 3)), 1)
    affine = np.eye(4)
    affine[:3, :3] = turn @ sheared @ np.diag(generator.uniform(0.7, 4.0, 3))
    affine[:3, 3] = generator.uniform(-30, 30, 3)
    return affine


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    index = np.moveaxis(np.indices(shape), 0, -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def rod(affine: np.ndarray, shape: tuple[int, int, int] = (21, 24, 18)) -> Scan:
    return accept((world(shape, affine) @ SLOPES).astype(np.float32), affine)


def inside(points: np.ndarray, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which world points lie between the outermost voxel centres of a grid."""
    index = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    return ((index > 1e-6) & (index < np.array(shape) - 1 - 1e-6)).all(axis=-1)


def to_unit(values: np.ndarray) -> np.ndarray:
    low, high = PLAN.ct_window_hu
    return np.clip((values - low) / (high - low), 0, 1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), view=st.integers(0, 2))
def test_every_prepared_voxel_holds_the_value_of_the_place_its_affine_names(seed: int, view: int) -> None:
    scan = rod(random_affine(seed))
    prepared = prepare(scan, PLAN, view)
    places = world(PLAN.shape, prepared.geometry.prepared_affine)
    within = inside(places, scan.affine, scan.array.shape)
    assume(within.sum() > 50)
    np.testing.assert_allclose(
        prepared.volume[0].numpy()[within], to_unit(places @ SLOPES)[within], atol=2e-5
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), view=st.integers(0, 2))
def test_there_and_back_every_voxel_is_where_it_was(seed: int, view: int) -> None:
    scan = rod(random_affine(seed))
    prepared = prepare(scan, PLAN, view)
    back, affine = lay_back(prepared.volume, prepared.geometry)
    assert back.shape == scan.array.shape and np.array_equal(affine, scan.affine)
    places = world(scan.array.shape, affine)
    # A voxel of the way back reads eight prepared voxels; all must have been inside the scan.
    grid = prepared.geometry.prepared_affine
    steps = np.array(list(itertools.product((-1, 1), repeat=3))) @ (grid[:3, :3]).T
    seen = inside(places, grid, PLAN.shape)
    for step in steps:
        seen &= inside(places + step, scan.affine, scan.array.shape)
    assume(seen.sum() > 20)
    np.testing.assert_allclose(back[seen], to_unit(scan.array)[seen], atol=5e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_smooth_scan_survives_within_interpolation_error(seed: int) -> None:
    affine = random_affine(seed)
    shape = (24, 24, 24)
    centre = world(shape, affine).reshape(-1, 3).mean(axis=0)
    distance = np.linalg.norm(world(shape, affine) - centre, axis=-1)
    scan = accept((1000 * np.exp(-((distance / 15) ** 2))).astype(np.float32), affine)
    plan = replace(PLAN, spacing_mm=(1.0, 1.0, 1.0), shape=(40, 40, 40))
    prepared = prepare(scan, plan)
    back, _ = lay_back(prepared.volume, prepared.geometry)
    near = (distance < 15) & inside(world(shape, affine), prepared.geometry.prepared_affine, plan.shape)
    for step in itertools.product((-2, 2), repeat=3):
        near &= inside(world(shape, affine) + step, affine, shape)
    assume(near.sum() > 20)
    # Linear interpolation of a bump of width 15 errs by at most h^2 / 8 times its curvature, per axis, twice.
    longest = np.linalg.norm(affine[:3, :3], axis=0).max()
    bound = 3 * (longest**2 + 1) / 8 * (2 / 15**2) * 0.5
    assert np.abs(back - to_unit(scan.array))[near].max() < bound


@pytest.mark.parametrize("seed", range(6))
def test_the_prepared_grid_is_that_of_monai_spacing_and_resize(seed: int) -> None:
    scan = rod(random_affine(seed, shear=0.0 if seed % 2 else 0.3))
    plan = replace(PLAN, shape=((16, 20, 12), (40, 9, 25))[seed // 3])
    values = torch.from_numpy(to_unit(scan.array).astype(np.float32))[None]
    pipeline = Compose([
        Orientation("RAS", labels=None),
        Spacing(plan.spacing_mm, mode="bilinear", padding_mode="zeros", dtype=torch.float64),
        ResizeWithPadOrCrop(plan.shape),
    ])  # fmt: skip
    wanted = pipeline(MetaTensor(values, affine=torch.from_numpy(scan.affine)))
    prepared = prepare(scan, plan)
    np.testing.assert_allclose(prepared.geometry.prepared_affine, wanted.affine.numpy(), atol=1e-9)
    within = inside(world(plan.shape, prepared.geometry.prepared_affine), scan.affine, scan.array.shape)
    assert within.sum() > 50
    np.testing.assert_allclose(prepared.volume[0][within], wanted.as_tensor()[0][within], atol=1e-6)


def test_a_scan_already_at_the_plans_spacing_is_cut_not_interpolated() -> None:
    generator = np.random.default_rng(0)
    array = generator.normal(0, 300, (35, 51, 36)).astype(np.float32)
    plan = replace(PLAN, spacing_mm=(1.0, 1.0, 1.0), shape=(32, 48, 40))
    volume = prepare(accept(array, np.eye(4)), plan).volume[0].numpy()
    np.testing.assert_allclose(volume[:, :, 2:38], to_unit(array)[1:33, 1:49], atol=1e-6)
    assert not volume[:, :, :2].any() and not volume[:, :, 38:].any()


def test_how_a_scan_is_stored_does_not_matter() -> None:
    affine = np.diag([1.0, 1.2, 2.1, 1.0])
    scan = rod(affine)
    wanted = prepare(scan, PLAN).volume
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            stored, placed = scan.array.transpose(order), affine[:, [*order, 3]]
            for axis in np.flatnonzero(flips):
                placed = placed.copy()
                placed[:3, 3] += placed[:3, axis] * (stored.shape[axis] - 1)
                placed[:3, axis] *= -1
                stored = np.flip(stored, axis)
            twin = Scan(np.ascontiguousarray(stored), placed)
            assert same_grid(scan, twin)
            torch.testing.assert_close(prepare(twin, PLAN).volume, wanted, atol=1e-5, rtol=0)


def test_a_grid_that_is_moved_or_cut_is_not_the_same_grid() -> None:
    affine = random_affine(3)
    scan, moved = rod(affine), affine.copy()
    moved[:3, 3] += affine[:3, 0] / 2
    assert not same_grid(scan, Scan(scan.array, moved))
    assert not same_grid(scan, Scan(scan.array[:-1], affine))
    assert not same_grid(scan, Scan(scan.array, np.eye(4)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), view=st.integers(0, 3))
def test_a_label_travels_with_its_image(seed: int, view: int) -> None:
    scan = rod(random_affine(seed))
    middle = np.median(scan.array)
    label = accept_label((scan.array > middle).astype(np.float32) * 7, scan.affine)
    prepared = prepare(scan, PLAN, view, label)
    assert prepared.label is not None and prepared.label.dtype == torch.int16
    assert set(prepared.label.unique().tolist()) <= {0, 7}
    places = world(PLAN.shape, prepared.geometry.prepared_affine)
    values = places @ SLOPES
    reach = np.abs(SLOPES @ scan.affine[:3, :3]).sum() / 2  # half a voxel, in the units of the scan
    sure = inside(places, scan.affine, scan.array.shape) & (np.abs(values - middle) > reach + 1e-3)
    assume(sure.sum() > 20)
    np.testing.assert_array_equal(prepared.label[0].numpy()[sure], 7 * (values > middle)[sure])


def test_a_label_stored_in_another_order_lands_on_the_same_voxels() -> None:
    scan = rod(np.diag([1.0, 1.2, 2.1, 1.0]))
    label = accept_label((scan.array > 20).astype(np.float32), scan.affine)
    turned = scan.affine[:, [2, 0, 1, 3]].copy()
    turned[:3, 3] += turned[:3, 0] * (label.array.shape[2] - 1)
    turned[:3, 0] *= -1
    twin = Scan(np.ascontiguousarray(label.array.transpose(2, 0, 1)[::-1]), turned)
    ours, theirs = prepare(scan, PLAN, 0, label).label, prepare(scan, PLAN, 0, twin).label
    assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_a_label_comes_back_with_its_own_numbers() -> None:
    scan = rod(np.diag([2.0, 1.5, 2.5, 1.0]), (16, 20, 12))
    label = accept_label(np.round(np.abs(scan.array)) % 300, scan.affine)
    prepared = prepare(scan, PLAN, 0, label)
    assert prepared.label is not None
    back, _ = lay_back(prepared.label, prepared.geometry)
    assert back.dtype == np.int16
    np.testing.assert_array_equal(back, label.array)


def test_view_0_is_the_scan_and_other_views_are_drawn_from_scan_and_number_alone() -> None:
    scan, other = rod(random_affine(1)), rod(random_affine(2))
    views = [prepare(scan, PLAN, view) for view in range(4)]
    for view, prepared in enumerate(views):
        assert torch.equal(prepare(scan, PLAN, view).volume, prepared.volume)
        assert all(not torch.equal(prepared.volume, p.volume) for p in views[view + 1 :])
    assert draw_view(scan.scan_id, 1) != draw_view(other.scan_id, 1)
    assert {draw_view(scan.scan_id, view).mirrored for view in range(1, 20)} == {True, False}


def test_a_mirrored_view_exchanges_left_and_right_and_turns_little() -> None:
    scan = rod(np.eye(4))
    for view in range(1, 12):
        drawn, grid = draw_view(scan.scan_id, view), prepare(scan, PLAN, view).geometry.prepared_affine
        axes = grid[:3, :3] / np.array(PLAN.spacing_mm) / drawn.scaling
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
        assert (np.linalg.det(axes) < 0) == drawn.mirrored
        turned = np.diag(axes) * [-1 if drawn.mirrored else 1, 1, 1]
        assert turned.min() > np.cos(np.radians(3 * 8))
        middle = (np.array(PLAN.shape) - 1) / 2
        still = prepare(scan, PLAN, 0).geometry.prepared_affine
        np.testing.assert_allclose((grid @ [*middle, 1])[:3], (still @ [*middle, 1])[:3], atol=1e-9)


def mr(array: np.ndarray) -> tuple[float, float]:
    return intensity_range(array.astype(np.float32), VolumePlan(modality="any"))


def test_masked_air_does_not_move_the_window_of_the_brain() -> None:
    generator = np.random.default_rng(0)
    brain = generator.normal(600, 100, (30, 30, 30)).astype(np.float32)
    masked = brain.copy()
    masked.flat[: int(0.6 * masked.size)] = 0.0
    np.testing.assert_allclose(mr(masked), mr(brain.ravel()[int(0.6 * brain.size) :][None, None]), rtol=1e-6)
    np.testing.assert_allclose(mr(masked), mr(brain), rtol=0.1)
    overshot = masked.copy()
    overshot.flat[:20] = -47.0  # ringing of an interpolation: zero is no longer the minimum
    np.testing.assert_allclose(mr(overshot), mr(masked), rtol=0.1)


def test_in_a_crop_without_background_every_voxel_counts() -> None:
    crop = np.random.default_rng(0).normal(600, 100, (30, 30, 30)).astype(np.float32)
    np.testing.assert_array_equal(mr(crop), np.percentile(crop, (0.5, 99.5)))
    crop.flat[:500] = crop.min()  # 2%: a dark structure, not a background
    np.testing.assert_array_equal(mr(crop), np.percentile(crop, (0.5, 99.5)))


def test_units_do_not_matter_to_mr_and_one_hot_voxel_does_not_darken_it() -> None:
    array = np.random.default_rng(0).gamma(2, 100, (20, 20, 20)).astype(np.float32)
    plan = VolumePlan(modality="any", shape=(16, 16, 16))
    wanted = prepare(accept(array, np.eye(4)), plan).volume
    scaled = prepare(accept(array * 1234 + 500, np.eye(4)), plan).volume
    torch.testing.assert_close(scaled, wanted, atol=1e-4, rtol=0)
    array[0, 0, 0] = 1e7
    torch.testing.assert_close(prepare(accept(array, np.eye(4)), plan).volume, wanted, atol=1e-3, rtol=0)


def test_a_few_bright_voxels_on_nothing_still_have_a_window() -> None:
    array = np.zeros((20, 20, 20), np.float32)
    array[0, 0, :2] = (5.0, 9.0)
    low, high = mr(array)
    assert low < high
    array[:] = 5.0
    array[0, 0, :2] = (0.0, 9.0)  # 99.9% the same
    assert mr(array) == (0.0, 9.0)


def test_a_ct_window_is_in_hounsfield_units_whatever_the_scan() -> None:
    array = np.linspace(-2000, 3000, 20**3, dtype=np.float32).reshape(20, 20, 20)
    plan = VolumePlan(modality="CT", window="ct_hu", shape=(20, 20, 20))
    volume = prepare(accept(array, np.eye(4)), plan).volume[0].numpy()
    np.testing.assert_allclose(volume, np.clip((array + 175) / 425, 0, 1), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), view=st.integers(0, 2), window=st.sampled_from(["mr_percentiles", "ct_hu"])
)
def test_every_volume_is_float32_between_0_and_1_in_the_plans_shape(
    seed: int, view: int, window: str
) -> None:
    array = np.random.default_rng(seed).normal(0, 10.0 ** (seed % 12), (7, 9, 3)).astype(np.float32)
    plan = replace(PLAN, window=window)
    volume = prepare(accept(array, random_affine(seed)), plan, view).volume
    assert volume.dtype == torch.float32 and volume.shape == (1, *plan.shape)
    assert 0.0 <= float(volume.min()) and float(volume.max()) <= 1.0 and bool(volume.isfinite().all())


def test_a_geometry_survives_json_exactly() -> None:
    geometry = prepare(rod(random_affine(5)), PLAN, 1).geometry
    again = Geometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert np.array_equal(again.source_affine, geometry.source_affine)
    assert np.array_equal(again.prepared_affine, geometry.prepared_affine)
    assert (again.source_shape, again.prepared_shape) == (geometry.source_shape, geometry.prepared_shape)


def test_a_volume_of_another_grid_is_not_laid_back() -> None:
    geometry = prepare(rod(np.eye(4)), PLAN).geometry
    with pytest.raises(ValueError, match="Expected a volume of"):
        lay_back(torch.zeros(1, 4, 4, 4), geometry)
