"""A label map is no scan, whatever it is called; a label is read where it can only mean one thing."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from client.scans.cohort import Cohort, open_cohort
from scans.scans import Reason, UnusableScan, accept_label, is_label_map
from scans.volume_plan import VolumePlan
from scans.volumes import kept_share, read_label, read_scan

SHAPE = (12, 14, 10)


def image(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, SHAPE).astype(np.uint8)


def regions(count: int) -> np.ndarray:
    """A map of blocks, one number each, on background."""
    array = np.zeros(SHAPE, np.int16)
    blocks = np.arange(count).repeat(8)[: 10 * 12 * 8].reshape(-1)
    array[1:11, 1:13, 1:9] = np.resize(blocks + 1, (10, 12, 8))
    return array


def opened(root: Path) -> Cohort:
    return open_cohort(root, plan=VolumePlan(modality="any", shape=(16, 16, 16)), split_salt="a")


def counted(cohort: Cohort) -> dict[str, int]:
    return dict(cohort.summary()["exclusions"])


@pytest.mark.parametrize("places", [("", ""), ("t1/", "DLMUSE_seg/")])
def test_label_maps_beside_scans_are_not_trained_on(tmp_path: Path, places: tuple[str, str]) -> None:
    for number in range(4):
        image(tmp_path / f"{places[0]}P{number}_T1.nii.gz", scan(number))
        image(tmp_path / f"{places[1]}P{number}_T1_DLMUSE.nii.gz", regions(100))
    cohort = opened(tmp_path)
    assert len(cohort.scans) == len(cohort.patients()) == 4
    assert counted(cohort) == {"label_not_chosen": 4}


@pytest.mark.parametrize("array", [regions(100), regions(8), scan(3) // 40], ids=["100", "8", "scattered"])
def test_a_label_map_that_no_name_tells_is_excluded_by_its_values(tmp_path: Path, array: np.ndarray) -> None:
    image(tmp_path / "P1" / "brain.nii.gz", scan(1))
    image(tmp_path / "P1" / "atlas.nii.gz", array)
    image(tmp_path / "P2" / "brain.nii.gz", scan(2))
    cohort = opened(tmp_path)
    assert len(cohort.scans) == 2 and counted(cohort) == {"label_map": 1}


def test_scans_stored_in_bytes_are_no_label_maps(data_root: Path) -> None:
    paths = [*sorted((data_root / "msd_hippocampus" / "images").glob("*.nii.gz"))[:20]]
    assert paths and not any(is_label_map(read_scan(path).array) for path in paths)
    labels = sorted((data_root / "ixi_hammersmith" / "derivatives" / "muse").rglob("*_dseg.nii.gz"))[:2]
    assert labels and all(is_label_map(read_label(path).array) for path in labels)


def test_a_value_within_a_thousandth_is_rounded_and_others_are_said() -> None:
    array = np.array([[[0.0, 1.0004], [2.0, 0.9996]]], np.float32)
    assert accept_label(array, np.eye(4)).array.tolist() == [[[0, 1], [2, 1]]]
    with pytest.raises(UnusableScan, match=r"fractions, e.g. 0.5") as refused:
        accept_label(array + np.float32(0.5) * (array == 0), np.eye(4))
    assert refused.value.reason is Reason.LABEL_NOT_INTEGER


def placeless(path: Path, array: np.ndarray, edges_mm: float = 1.0) -> Path:
    made = nib.Nifti1Image(array, None)
    made.header.set_zooms((edges_mm,) * 3)
    made.header["sform_code"] = made.header["qform_code"] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(made, path)
    return path


def test_a_label_without_a_place_takes_its_images_and_says_so(tmp_path: Path) -> None:
    affine = np.array([[0.0, -1, 0, 5], [1, 0, 0, -7], [0, 0, 1, 3], [0, 0, 0, 1]])
    image(tmp_path / "P1.nii.gz", scan(1), affine)
    placeless(tmp_path / "P1_seg.nii.gz", regions(3))
    image(tmp_path / "P2.nii.gz", scan(2), affine)
    placeless(tmp_path / "P2_seg.nii.gz", regions(3), edges_mm=2.0)
    cohort = opened(tmp_path)
    first, second = cohort.scans
    assert first.placed_label and first.label_path is not None and second.label_path is None
    label = read_label(tmp_path / "P1_seg.nii.gz", read_scan(tmp_path / "P1.nii.gz"))
    assert np.array_equal(label.affine, affine) and label.placed
    assert counted(cohort) == {"no_orientation": 1}


def test_what_a_crop_keeps_of_a_scan_is_counted(tmp_path: Path) -> None:
    array = np.zeros((40, 20, 20), np.float32)
    array[5:35] = 100 + np.random.default_rng(0).normal(size=(30, 20, 20))
    read = read_scan(image(tmp_path / "a.nii.gz", array))
    assert kept_share(read, VolumePlan(modality="any", shape=(40, 20, 20))) == 1.0
    half = kept_share(read, VolumePlan(modality="any", shape=(15, 20, 20)))
    assert abs(half - 0.5) < 0.03
    assert kept_share(read, VolumePlan(modality="any", shape=(8, 10, 10), spacing_mm=(4.0, 4.0, 4.0))) > 0.95
