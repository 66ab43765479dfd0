"""The rows of `odd_cases` that are about volumes and headers, and what `dicom_small` and `nifti_odd` hold."""

from pathlib import Path

import numpy as np
import pytest

from client.scans.cohort import Cohort, open_cohort
from scans.dicom import find_series
from scans.scans import Note, Reason, UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import read_files, read_scan

DICOM = "dicom_small/dicom2nifti_tests/tests/data"


@pytest.fixture
def odd(data_root: Path) -> Path:
    folder = data_root / "odd_cases"
    if not folder.is_dir():
        pytest.skip(f"needs odd_cases in {data_root}")
    return folder


def opened(root: Path, **plan: object) -> Cohort:
    names = {"MR": "any", "CT": "any"}
    volumes = VolumePlan(**{"modality": "any", **plan})  # type: ignore[arg-type]
    return open_cohort(root, plan=volumes, split_salt="a", modality_names=names)


@pytest.mark.parametrize(
    ("name", "edges", "notes"),
    [
        ("qfac0.nii", (1.3, 1.3, 8), ()),
        ("quat_rounding.nii", (1.3, 1.3, 8), ()),
        ("sform_without_scale.nii.gz", (1.3158, 1.3158, 10), (Note.SFORM_WITHOUT_SCALE,)),
        ("units_micron.nii", (0.05, 0.05, 0.05), (Note.UNIT,)),
        ("gz_trailing_garbage.nii.gz", (1.3, 1.3, 8), (Note.TRAILING_BYTES,)),
        ("nan_background.nii.gz", (1.3, 1.3, 8), (Note.NAN_BACKGROUND,)),
    ],
)
def test_a_header_is_read_as_the_standard_says_and_what_is_odd_is_said(
    odd: Path, name: str, edges: tuple[float, ...], notes: tuple[Note, ...]
) -> None:
    scan = read_scan(odd / "nifti" / name)
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, :3], axis=0), edges, rtol=1e-4)
    assert scan.notes == notes


def test_a_ct_stored_from_zero_is_said_by_check(odd: Path, data_root: Path) -> None:
    cohort = opened(odd / "nifti", window="ct_hu")
    noted = {scan.path.name for scan in cohort.scans if Note.NOT_HOUNSFIELD in scan.notes}
    assert "ct_offset_1024.nii.gz" in noted
    for real in ("totalseg_apache/example_ct_sm.nii.gz", "ivadomed_ccbysa/sub-spleen2_ct.nii.gz"):
        (scan,) = opened_one(data_root / "nifti_odd" / real)
        assert scan == ()


def opened_one(path: Path) -> list[tuple[Note, ...]]:
    cohort = opened(path.parent, window="ct_hu")
    return [scan.notes for scan in cohort.scans if scan.path == path]


def test_two_echoes_under_one_uid_are_never_mixed(odd: Path) -> None:
    folder = odd / "dicom" / "instance_numbers_restart"
    series, left_over = find_series(sorted(folder.iterdir()))
    means = sorted(float(read_files(one.files).array.mean()) for one in series)
    assert means == [108.5, 1008.5] and not left_over
    # slices of one value each: to the cohort they look like label maps, and are excluded as such
    assert {one.reason for one in opened(folder).exclusions} == {Reason.LABEL_MAP}


def test_two_patients_under_one_uid_are_two_patients(odd: Path) -> None:
    cohort = opened(odd / "dicom" / "two_patients_one_uid")
    assert sorted(scan.patient for scan in cohort.scans) == ["p1", "p2"]
    for scan in cohort.scans:
        assert {path.name[:2] for path in scan.files} == {scan.patient}


@pytest.mark.parametrize(
    ("name", "slices", "left"),
    [
        ("no_preamble", 8, {}),
        ("scout_in_series", 24, {"000.dcm": Reason.LOCALIZER}),
        ("resent_slices", 8, {"002(1).dcm": Reason.DUPLICATE, "005(1).dcm": Reason.DUPLICATE}),
    ],
)
def test_one_odd_frame_leaves_alone(odd: Path, name: str, slices: int, left: dict[str, Reason]) -> None:
    cohort = opened(odd / "dicom" / name)
    (scan,) = cohort.scans
    assert read_files(scan.files).array.shape[2] == slices
    found = {one.path.name.replace("002.", "002(1).").replace("005.", "005(1)."): one.reason
             for one in cohort.exclusions}  # fmt: skip
    assert found == left  # either copy of a slice may stay


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ("failing/slicecount/001", r"too_few_slices: 2 frames"),
        (
            "failing/sliceincrement/002",
            r"uneven_slices: gaps of 1\.499 mm after slice 3; 0\.750 mm elsewhere",
        ),
        ("failing/sliceorientation/001", "mixed_orientation"),
        ("siemens/fmri/001", "mosaic"),
        ("generic/rgb/001", "rgb"),
    ],
)
def test_what_is_no_volume_is_refused_by_name(data_root: Path, series: str, reason: str) -> None:
    with pytest.raises(UnusableScan, match=f"^{reason}"):
        read_scan(data_root / DICOM / series)


def test_volumes_over_time_of_an_enhanced_object_are_its_own_indices(data_root: Path) -> None:
    scan = read_scan(data_root / DICOM / "philips_enhanced/fmri/001")
    assert scan.num_volumes == 4 and not scan.notes


def test_real_headers_of_five_programs_contradict_nothing(data_root: Path) -> None:
    usable = 0
    for path in sorted((data_root / "nifti_odd").rglob("*.nii*")):
        try:
            assert read_scan(path).notes == (), path.name
            usable += 1
        except UnusableScan as error:
            assert error.reason in (Reason.RGB, Reason.TWO_VALUED, Reason.TOO_FEW_SLICES), path.name
    assert usable >= 10


def test_check_counts_and_names_what_is_odd(odd: Path, tmp_path: Path) -> None:
    from client.checks.intake import NOTED, cohort_lines

    cohort = opened(odd / "nifti", window="ct_hu")
    lines = {
        name: line for name, _, line, _ in cohort_lines(cohort, VolumePlan(modality="any", window="ct_hu"))
    }
    assert lines["sform without scale"].startswith("1 scans have a sform of 1 x 1 x 1 mm")
    assert "sform_without_scale.nii.gz" in lines["sform without scale"]
    assert (
        "ct_offset_1024.nii.gz" in lines["not hounsfield"]
        or "scans are read as CT" in lines["not hounsfield"]
    )
    assert set(NOTED) == set(Note), "every note has its words"
    cohort.write_csv(tmp_path)
    assert "sform_without_scale" in (tmp_path / "cohort.csv").read_text(encoding="utf-8")
