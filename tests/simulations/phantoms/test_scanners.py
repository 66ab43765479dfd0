"""Scanners: deterministic, different from each other, physical, and honest about where the patient is."""

import dataclasses
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import affine_transform

from scans.scans import Scan
from scans.volumes import read_label, read_scan
from simulations.phantoms.atlas import grid_affine, grid_shape, load_atlas
from simulations.phantoms.patients import (
    TISSUES,
    Anatomy,
    Population,
    apply_patient,
    draw_patient,
    label_volume,
)
from simulations.phantoms.scanners import (
    Acquisition,
    Movement,
    Scanner,
    draw_acquisition,
    draw_scanner,
    with_settings,
)
from simulations.phantoms.scans import (
    coil_sensitivity,
    field_of_view,
    render,
    scan_image,
    slice_anatomy,
    write_labels,
    write_scan,
)

PLAIN = Scanner(noise=0.0, coil_strength=0.0, gain_jitter=0.0)
STILL = Acquisition()


def scanner(index: int, seed: int = 11) -> Scanner:
    return draw_scanner(np.random.default_rng([seed, index]), index, f"hospital{index}")


@cache
def anatomy(seed: int, resolution_mm: int = 4) -> Anatomy:
    drawn = draw_patient(np.random.default_rng(seed), Population())
    return apply_patient(drawn, load_atlas(resolution_mm))


def block(low: int = 16, high: int = 32) -> Anatomy:
    """A cube of white matter in air, 2 mm voxels."""
    tissues = np.zeros((len(TISSUES), 48, 48, 48), np.float32)
    tissues[TISSUES.index("wm"), low:high, low:high, low:high] = 1
    return Anatomy(tissues, np.zeros((48, 48, 48), np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))


def centroid_mm(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    index = np.indices(values.shape).reshape(3, -1)
    middle = (index * values.reshape(-1)).sum(axis=1) / values.sum()
    return affine[:3, :3] @ middle + affine[:3, 3]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def label_of(tissue: str) -> int:
    return 1 + TISSUES.index(tissue)


def onto_template(scan: Scan, resolution_mm: int) -> np.ndarray:
    """Nearest-neighbour resampling by world coordinates, as a reader would who trusts the header."""
    to_voxel = np.linalg.inv(scan.affine) @ grid_affine(resolution_mm)
    return affine_transform(scan.array, to_voxel, output_shape=grid_shape(resolution_mm), order=0)


def test_a_seed_fixes_scanner_acquisition_and_scan_bit_for_bit() -> None:
    one, two = scanner(1), scanner(1)
    assert one == two
    taken = [draw_acquisition(np.random.default_rng(5), one) for _ in range(2)]
    assert taken[0] == taken[1] != draw_acquisition(np.random.default_rng(6), one)
    values = [render(anatomy(0), one, acquisition)[0].tobytes() for acquisition in taken]
    assert values[0] == values[1]


def appearance(values: np.ndarray) -> np.ndarray:
    """Quantiles, brightness of eight blocks, and roughness: nothing that knows anatomy."""
    low, high = np.percentile(values, (0.5, 99.5))
    scaled = (values - low) / (high - low)
    halves = [(slice(0, n // 2), slice(n // 2, n)) for n in scaled.shape]
    blocks = [scaled[x, y, z].mean() / scaled.mean() for x in halves[0] for y in halves[1] for z in halves[2]]
    rough = [np.abs(np.diff(scaled, n=2, axis=a)).mean() for a in range(3)]
    return np.array([*np.quantile(scaled, np.linspace(0.05, 0.95, 10)), *blocks, *np.log(rough)])


@pytest.mark.parametrize(("num_scanners", "accuracy"), [(3, 0.95), (6, 0.75)])
def test_a_trivial_statistic_tells_the_hospitals_apart(num_scanners: int, accuracy: float) -> None:
    features, owners = [], []
    for index in range(num_scanners):
        for seed in range(4):
            taken = draw_acquisition(np.random.default_rng([seed, index]), scanner(index))
            values, _ = render(anatomy(seed), scanner(index), taken)
            features.append(appearance(values))
            owners.append(index)
    points, owner = np.array(features) / np.std(features, axis=0), np.array(owners)
    right = 0
    for i in range(len(points)):
        others = np.arange(len(points)) != i
        means = [points[others & (owner == s)].mean(axis=0) for s in range(num_scanners)]
        right += int(np.argmin([np.linalg.norm(points[i] - m) for m in means])) == owner[i]
    assert right / len(points) > accuracy


def test_every_drawn_scanner_shows_fluid_dark_grey_between_and_white_bright() -> None:
    for index in range(20):
        signals = scanner(index, seed=index).signals
        assert signals["csf"] < signals["lesion"] < signals["gm"] < signals["wm"] == 1
        assert signals["gm"] - signals["csf"] > 0.2


def test_grey_white_contrast_follows_the_sequence_not_a_table() -> None:
    short, long = (dataclasses.replace(PLAIN, inversion_ms=ti).signals["gm"] for ti in (850.0, 1100.0))
    low, high = (
        dataclasses.replace(PLAIN, sequence="spgr", repetition_ms=20.0, flip_deg=flip).signals["gm"]
        for flip in (35.0, 5.0)
    )
    assert short < long < low < high
    assert high > 1  # a small angle weights by proton density: grey matter becomes the brighter one


def test_noise_of_air_is_rayleigh_with_the_stated_deviation() -> None:
    """Mean of a Rayleigh variable is sigma sqrt(pi / 2); 20,000 voxels put 4 standard errors at 1.5%."""
    for in_plane_mm, slice_mm in ((2.0, 2.0), (3.0, 2.0), (2.6, 4.0)):
        noisy = dataclasses.replace(
            PLAIN, noise=0.05, scale=1.0, in_plane_mm=in_plane_mm, slice_mm=slice_mm, gibbs=0.5
        )
        empty = dataclasses.replace(block(), tissues=np.zeros_like(block().tissues))
        values, _ = render(empty, noisy, Acquisition(noise_seed=3))
        assert values.mean() == pytest.approx(0.05 * np.sqrt(np.pi / 2), rel=0.03)


def test_without_noise_coil_or_blur_a_scan_is_the_tissue_signal() -> None:
    values, affine = render(anatomy(0), PLAIN, STILL)
    shown = anatomy(0)
    expected = np.tensordot(np.array([PLAIN.signals[t] for t in TISSUES]), shown.tissues, axes=1)
    expected = np.maximum(expected + (1 - PLAIN.signals["gm"]) * shown.texture, 0)
    assert np.allclose(values, 600 * expected, atol=0.5)
    assert np.array_equal(affine, shown.affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_leave_the_patient_where_she_is(axis: int) -> None:
    thin, thick = (dataclasses.replace(PLAIN, slice_axis=axis, slice_mm=mm) for mm in (2.0, 4.7))
    (fine, fine_affine), (coarse, coarse_affine) = (render(block(), s, STILL) for s in (thin, thick))
    assert coarse.shape[axis] == round(96 / 4.7) and fine.shape[axis] == 48
    shift_mm = centroid_mm(coarse, coarse_affine) - centroid_mm(fine, fine_affine)
    assert np.abs(shift_mm).max() < 0.3
    labels = slice_anatomy(block(), thick)
    assert labels.tissues.shape[1:] == coarse.shape
    assert np.array_equal(labels.affine, coarse_affine)
    assert np.abs(centroid_mm(labels.tissues.sum(axis=0), labels.affine) - 47.0).max() < 0.5


def test_a_hard_edge_of_k_space_rings_and_an_apodised_one_does_not() -> None:
    ringing, smooth = (
        render(block(), dataclasses.replace(PLAIN, in_plane_mm=4.0, scale=1.0, gibbs=gibbs), STILL)[0]
        for gibbs in (1.0, 0.0)
    )
    assert ringing.max() > 1.05 * smooth.max()
    assert smooth.max() < 1.05


def test_lower_resolution_blurs_the_slice_plane_only() -> None:
    values, _ = render(block(), dataclasses.replace(PLAIN, in_plane_mm=5.0, gibbs=0.0, scale=1.0), STILL)
    steepness = [np.abs(np.diff(values, axis=axis)).max() for axis in range(3)]
    assert steepness[2] > 0.95 > 0.7 > max(steepness[:2])


def test_movement_leaves_ghosts_but_not_another_patient() -> None:
    moved = Acquisition(
        movements=(Movement(at=0.1, shift_mm=(2.0, 3.0)), Movement(at=-0.3, shift_mm=(-1.0, 2.0)))
    )
    (still, affine), (ghosts, _) = (render(block(), PLAIN, taken) for taken in (STILL, moved))
    assert np.abs(ghosts - still).max() > 0.1 * still.max()
    assert np.corrcoef(ghosts.ravel(), still.ravel())[0, 1] > 0.95
    assert np.abs(centroid_mm(ghosts**2, affine) - centroid_mm(still**2, affine)).max() < 1.0


def test_the_coil_pattern_is_the_scanners_own_and_as_strong_as_stated() -> None:
    strong = dataclasses.replace(PLAIN, coil_strength=0.2, coil_seed=1)
    pattern = np.log(coil_sensitivity((48, 56, 48), strong, STILL))
    assert pattern.std() == pytest.approx(0.2, rel=0.15)
    again, other = (
        np.log(coil_sensitivity((48, 56, 48), dataclasses.replace(strong, coil_seed=s), STILL))
        for s in (1, 2)
    )
    assert np.array_equal(pattern, again)
    assert np.corrcoef(pattern.ravel(), other.ravel())[0, 1] < 0.9
    assert np.abs(np.gradient(pattern)).max() < 0.1  # smooth: less than 10% from voxel to voxel
    assert np.all(coil_sensitivity((8, 8, 8), PLAIN, STILL) == 1)


ODDITIES = [
    {},
    {"orientation": "LPI", "header": "sform_only"},
    {"orientation": "PSR", "header": "qform_only", "dtype": "float32", "scale": 4e4},
    {"orientation": "SAL", "header": "trailing_axis", "dtype": "uint16", "slope": 0.1, "intercept": -12.0},
    {"oblique_deg": (8.0, -6.0, 5.0), "orientation": "AIL", "header": "qform_only", "slope": 0.05},
    {"oblique_deg": (-9.0, 4.0, 7.0), "slice_mm": 5.0, "slice_axis": 1, "dtype": "uint8", "scale": 120.0},
]


@pytest.mark.parametrize("oddity", ODDITIES, ids=[", ".join(o) or "plain" for o in ODDITIES])
def test_world_coordinates_survive_the_oddities_of_a_file(oddity: dict[str, object], tmp_path: Path) -> None:
    odd = with_settings(dataclasses.replace(PLAIN, noise=0.02), oddity)
    drawn = draw_patient(np.random.default_rng(2), Population())
    taken = draw_acquisition(np.random.default_rng(1), odd)
    shown = apply_patient(drawn, load_atlas(2), *field_of_view(odd, taken, 2))
    values, affine = render(shown, odd, taken)
    write_scan(tmp_path / "scan.nii.gz", values, affine, odd)
    labels = label_volume(slice_anatomy(shown, odd))
    write_labels(tmp_path / "label.nii.gz", labels, affine, odd)
    assert {path.name for path in tmp_path.iterdir()} == {"scan.nii.gz", "label.nii.gz"}

    stored = nib.load(tmp_path / "scan.nii.gz")
    assert "".join(nib.aff2axcodes(stored.affine)) == odd.orientation
    assert stored.get_data_dtype() == np.dtype(odd.dtype)
    assert (stored.ndim == 4) == (odd.header == "trailing_axis")
    expected_slope = (odd.slope, odd.intercept) if odd.slope else (1.0, 0.0)
    assert (stored.dataobj.slope, stored.dataobj.inter) == pytest.approx(expected_slope)

    truth = label_volume(apply_patient(drawn, load_atlas(2)))
    found = onto_template(read_label(tmp_path / "label.nii.gz"), 2)
    lowest = 0.7 if odd.slice_mm > 2 else 0.8
    for tissue in ("csf", "gm", "wm"):
        assert dice(truth == label_of(tissue), found == label_of(tissue)) > lowest
    assert dice(truth > 0, found > 0) > 0.95

    read = read_scan(tmp_path / "scan.nii.gz")
    straight, _ = render(
        apply_patient(drawn, load_atlas(2)), dataclasses.replace(PLAIN, scale=odd.scale), STILL
    )
    shown_there = onto_template(read, 2)
    inner = (slice(10, -10),) * 3
    assert np.corrcoef(straight[inner].ravel(), shown_there[inner].ravel())[0, 1] > (
        0.85 if odd.slice_mm > 2 else 0.9
    )
    within = 0.15 if odd.slice_mm > 2 else 0.1  # thick slices mix tissues
    assert np.median(shown_there[truth == label_of("wm")]) == pytest.approx(
        odd.scale * taken.gain, rel=within
    )


def test_stored_values_read_back_within_half_a_step(tmp_path: Path) -> None:
    odd = dataclasses.replace(PLAIN, dtype="uint16", slope=0.25, intercept=-7.0, orientation="PIL")
    values, affine = render(anatomy(1), odd, STILL)
    write_scan(tmp_path / "scan.nii.gz", values, affine, odd)
    back = nib.as_closest_canonical(nib.load(tmp_path / "scan.nii.gz"))
    assert np.abs(back.get_fdata() - values).max() <= 0.125 + 1e-3
    assert np.allclose(back.affine, affine, atol=1e-4)


def test_restyling_an_image_is_a_monotone_change_of_its_contrast_where_nothing_blurs() -> None:
    image = np.random.default_rng(0).gamma(3.0, 200.0, size=(20, 21, 19)).astype(np.float32)
    for index in range(3):
        drawn = scanner(index)
        clear = dataclasses.replace(
            drawn, noise=0.0, coil_strength=0.0, in_plane_mm=2.0, slice_mm=2.0, motion_mm=0.0
        )
        styled = scan_image(image, clear, STILL)
        order = np.argsort(image, axis=None)
        assert styled.shape == image.shape
        assert np.diff(styled.ravel()[order]).min() > -1e-3 * styled.max()
        assert np.ptp(styled) > 0.5 * clear.scale


def test_restyling_does_not_ring_across_the_borders_of_a_crop() -> None:
    ramp = np.linspace(0, 1000, 30, dtype=np.float32)[:, None, None] * np.ones((1, 30, 30), np.float32)
    coarse = dataclasses.replace(PLAIN, in_plane_mm=4.0, gibbs=1.0, scale=1.0)
    sharp = dataclasses.replace(coarse, in_plane_mm=2.0)
    difference = scan_image(ramp, coarse, STILL) - scan_image(ramp, sharp, STILL)
    assert np.abs(difference).max() < 0.15


def test_a_constant_image_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one intensity"):
        scan_image(np.full((8, 8, 8), 7.0), PLAIN, STILL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fieldstrength": 3.0}, "has no setting 'fieldstrength'"),
        ({"field_t": "three"}, "field_t to be float"),
        ({"orientation": "RRS"}, "three axis codes"),
        ({"gibbs": 2.0}, r"gibbs in \[0, 1\]"),
        ({"slice_mm": 0.0}, "slice_mm > 0"),
    ],
)
def test_settings_that_no_scanner_has_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(PLAIN, settings)
