"""Sisters of `odd_cases`: inputs of the same kinds that are not in that folder. All are synthetic."""

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from client.scans.cohort import Cohort, open_cohort
from scans.scans import Note, Reason
from scans.volume_plan import VolumePlan
from tests.scans.test_stacks import header_of, stack, write


def opened(root: Path, **settings: object) -> Cohort:
    names = {"MR": "any", "CT": "any", "T1w": "any"}
    plan = VolumePlan(modality="any")
    return open_cohort(root, plan=plan, split_salt="a", modality_names=names, **settings)  # type: ignore[arg-type]


def reasons(cohort: Cohort) -> dict[Reason, int]:
    return dict(Counter(exclusion.reason for exclusion in cohort.exclusions))


def scan(path: Path, seed: int, intent: int = 0, *more: int) -> None:
    values = np.random.default_rng(seed).gamma(2.0, 100.0, (14, 16, 12, *more)).astype(np.float32)
    image = nib.Nifti1Image(values, np.eye(4))
    image.header["intent_code"] = intent
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


@pytest.mark.parametrize(
    "made",
    ["c1t1.nii", "mwc2t1.nii", "mri/mwp1t1.nii", "y_t1.nii", "iy_t1.nii", "t1_pve_0.nii.gz",
     "t1_Posteriors2.nii.gz", "t1_prob.nii.gz", "t1_1Warp.nii.gz", "t1_jac.nii.gz", "t1_gm.nii.gz",
     "t1_csf_prob.nii.gz", "t1_brain.nii.gz", "t1_BET.nii.gz", "t1_n4.nii.gz", "t1_bias_corrected.nii.gz",
     "t1_Crop_1.nii.gz", "t1_skull_stripped.nii.gz", "t1_reoriented.nii.gz"],
)  # fmt: skip
def test_a_map_that_software_made_of_a_scan_is_no_scan(tmp_path: Path, made: str) -> None:
    for number in range(3):
        scan(tmp_path / f"P{number}" / "t1.nii.gz", number)
        scan(tmp_path / f"P{number}" / made, 10 + number)
    cohort = opened(tmp_path)
    assert {scan.path.name for scan in cohort.scans} == {"t1.nii.gz"} and len(cohort.patients()) == 3
    assert reasons(cohort) == {Reason.DERIVATIVE: 3}


def test_what_spm_leaves_in_a_bids_folder_is_no_scan(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"sub-{number:02d}" / "anat"
        scan(folder / f"sub-{number:02d}_T1w.nii.gz", number)
        scan(folder / f"c1sub-{number:02d}_T1w.nii", 10 + number)
    cohort = opened(tmp_path)
    assert len(cohort.scans) == 2 and reasons(cohort) == {Reason.DERIVATIVE: 2}


def test_a_scan_whose_own_name_looks_made_is_a_scan(tmp_path: Path) -> None:
    names = (
        "c1.nii.gz",
        "p1.nii.gz",
        "t1.nii.gz",
        "p1_t1.nii.gz",
        "c2_t2.nii.gz",
        "P3t1.nii.gz",
        "c4t2.nii.gz",
    )
    for seed, name in enumerate(names):
        scan(tmp_path / name, seed)
    assert Reason.DERIVATIVE not in reasons(opened(tmp_path))


@pytest.mark.parametrize(("intent", "more"), [(1007, (3,)), (2006, (3,)), (3, ()), (1005, (6,))])
def test_vectors_deformations_and_statistics_are_no_scans(
    tmp_path: Path, intent: int, more: tuple[int, ...]
) -> None:
    scan(tmp_path / "P1" / "t1.nii.gz", 1)
    scan(tmp_path / "P2" / "t1.nii.gz", 2, intent, *more)
    cohort = opened(tmp_path)
    assert len(cohort.scans) == 1 and reasons(cohort) == {Reason.DERIVATIVE: 1}


@pytest.mark.parametrize("which", [slice(None, None, 2), slice(3)])
def test_slices_of_which_some_lack_their_intercept_are_not_one_volume(tmp_path: Path, which: slice) -> None:
    headers = stack(1)
    for header in headers[which]:
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
    write(tmp_path / "s", headers)
    cohort = opened(tmp_path, layout="dicom")
    assert not cohort.scans and reasons(cohort) == {Reason.AMBIGUOUS_FRAMES: 1}
    assert cohort.exclusions[0].detail == "RescaleIntercept"


def test_a_picture_meant_to_be_seen_inverted_is_said_and_half_of_one_refused(tmp_path: Path) -> None:
    for name, count in (("all", 6), ("some", 3)):
        headers = stack(1 + count, PatientID=name, SeriesInstanceUID=f"1.2.{count}")
        for header in headers[:count]:
            header.PhotometricInterpretation = "MONOCHROME1"
        write(tmp_path / name, headers)
    cohort = opened(tmp_path, layout="dicom")
    assert [(scan.patient, scan.notes) for scan in cohort.scans] == [("all", (Note.INVERTED,))]
    assert reasons(cohort) == {Reason.AMBIGUOUS_FRAMES: 1}


def test_bits_beyond_those_stored_are_no_values(tmp_path: Path) -> None:
    from scans.volumes import read_scan

    headers = stack(1)
    for header in headers:
        header.BitsStored, header.HighBit = 12, 11
        pixels = np.frombuffer(header.PixelData, "<u2").copy()
        pixels[::7] |= 0x8000  # an overlay, as scanners kept it once
        header.PixelData = pixels.tobytes()
    write(tmp_path / "s", headers)
    assert read_scan(tmp_path / "s").array.max() < 4096


def test_a_slice_without_a_series_says_so(tmp_path: Path) -> None:
    header = header_of(0.0, 1000)
    del header.SeriesInstanceUID
    write(tmp_path / "s", [header, *stack(2)])
    cohort = opened(tmp_path, layout="dicom")
    assert len(cohort.scans) == 1
    assert [exclusion.detail for exclusion in cohort.exclusions] == ["no SeriesInstanceUID or SOPInstanceUID"]


def test_an_id_by_another_case_is_doubted_and_a_blank_behind_it_is_nothing(tmp_path: Path) -> None:
    for number, name in enumerate(("P001", "p001", "P001 ", "P002")):
        write(tmp_path / f"s{number}", stack(number + 1, PatientID=name, SeriesInstanceUID=f"1.2.{number}"))
    cohort = opened(tmp_path, layout="dicom")
    assert sorted({scan.patient for scan in cohort.scans}) == ["P001", "P002", "p001"]
    assert any("P001 and p001" in doubt for doubt in cohort.patient_map.doubts)


def test_zeros_lost_in_a_spreadsheet_are_no_other_patient(tmp_path: Path) -> None:
    for number in range(1, 5):
        scan(tmp_path / f"{number:03d}" / "t1.nii.gz", number)
    (tmp_path / "covariates.csv").write_text("patient,age\n1,30\n2,40\n3,50\nx4,60\n")
    cohort = opened(tmp_path)
    assert [scan.covariates.get("age") for scan in cohort.scans] == [30.0, 40.0, 50.0, None]
    (join,) = cohort.joins
    assert (join.rows_without_scan, join.scans_without_row) == (1, 1)
