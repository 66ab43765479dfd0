"""Where every real odd file ends: the table, and that it is complete.

`in`: in the cohort. `label`: in the cohort as the label of an image. Otherwise the reason of its exclusion.
"""

from pathlib import Path

from client.scans.cohort import Cohort, open_cohort
from scans.volume_plan import VolumePlan

NIFTI_ODD = {
    "ivadomed_ccbysa/rgb_test_file.nii.gz": "rgb",
    "ivadomed_ccbysa/sub-spleen2_ct.nii.gz": "in",
    "ivadomed_ccbysa/sub-spleen2_ct_seg-manual.nii.gz": "label",
    "ivadomed_ccbysa/sub-unf01_T1w_lesion-manual.nii.gz": "label_without_image",
    "ivadomed_ccbysa/sub-unf02_T2star.nii.gz": "too_few_slices",  # 45 x 45 x 2
    "philips_bsd/EPI_asc_CLEAR_201.nii": "in",  # 4-D, slope and intercept
    "sct_mit/dwi_mean.nii.gz": "in",  # 20:1, slope and intercept
    "sct_mit/fmri_r.nii.gz": "in",  # 4-D
    "sct_mit/mt0.nii.gz": "in",
    "sct_mit/t1w.nii.gz": "in",  # slope and intercept
    "sct_mit/t2.nii.gz": "in",  # PSR
    "sct_mit/t2_seg-manual.nii.gz": "label",
    "sct_mit/t2s_seg-deepseg.nii.gz": "label_without_image",  # int64
    "totalseg_apache/example_ct_sm.nii.gz": "in",
    "totalseg_apache/example_mr_sm.nii.gz": "in",  # LPS, oblique
    "totalseg_apache/example_seg.nii.gz": "label_without_image",  # its name is no image's
}
NIFTI_SIDECARS = {
    "ivadomed_ccbysa/README.md",
    "philips_bsd/EPI_asc_CLEAR_201.json",
    "philips_bsd/LICENSE",
    "sct_mit/LICENSE",
    "totalseg_apache/LICENSE",
}

DICOM_SMALL = {
    "failing/gantrytilting/001": "in",
    "failing/slicecount/001": "too_few_slices",
    "failing/sliceincrement/002": "uneven_slices",
    "failing/sliceorientation/001": "mixed_orientation",
    "ge/anatomical/001": "in",
    "ge/dti/002": "in",  # 4-D
    "generic/anatomical/002_non_isotropic": "in",  # another slope in every slice
    "generic/compressed_j2k/001": "in",
    "generic/compressed_jpeg/001": "duplicate",  # of the one before, once decompressed
    "generic/compressed_jpegls/001": "duplicate",
    "generic/compressed_rle/001": "duplicate",
    "generic/rgb/001": "rgb",
    "hitachi/anatomical/001": "in",
    "hyperfine/anatomical/001": "in",  # enhanced multi-frame
    "philips/anatomical/001": "in",
    "philips/anatomical/001_implicit": "in",
    "philips_enhanced/anatomical/001": "in",  # enhanced multi-frame
    "philips_enhanced/fmri/001": "in",  # enhanced multi-frame, 4-D
    "siemens/anatomical/001": "in",
    "siemens/fmri/001": "mosaic",
    "siemens_multiframe/anatomical/001": "in",  # enhanced multi-frame
}


def outcomes(cohort: Cohort) -> dict[str, str]:
    """Every file of the cohort's folder, and where it ended; fails if one ended in two places."""
    ended = [(file, "in") for scan in cohort.scans for file in scan.files]
    ended += [(scan.label_path, "label") for scan in cohort.scans if scan.label_path is not None]
    ended += [(file, out.reason.value) for out in cohort.exclusions for file in out.all_files]
    assert len(ended) == len({file for file, _ in ended})
    return {file.relative_to(cohort.root).as_posix(): where for file, where in ended}


def test_every_odd_nifti_ends_where_the_table_says_and_none_is_missing(data_root: Path) -> None:
    root = data_root / "nifti_odd"
    cohort = open_cohort(root, plan=VolumePlan(modality="any"), split_salt="a")
    wanted = NIFTI_ODD | dict.fromkeys(NIFTI_SIDECARS, "sidecar")
    assert outcomes(cohort) == wanted
    assert set(wanted) == {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_every_dicom_series_ends_where_the_table_says_and_none_is_missing(data_root: Path) -> None:
    root = data_root / "dicom_small" / "dicom2nifti_tests" / "tests" / "data"
    plan = VolumePlan(modality="any")
    cohort = open_cohort(
        root, plan=plan, split_salt="a", layout="dicom", modality_names={"MR": "any", "CT": "any"}
    )
    by_file = outcomes(cohort)
    assert set(by_file) == {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    by_folder: dict[str, set[str]] = {}
    for name, where in by_file.items():
        by_folder.setdefault(name.rpartition("/")[0], set()).add(where)
    truths = {name for name in by_file if name.endswith("_ground_truth.nii.gz")}
    assert {by_file[name] for name in truths} == {"unsupported_format"}  # NIfTI, in the DICOM layout
    without_truths = {
        folder: found - {"unsupported_format"} for folder, found in by_folder.items() if folder in DICOM_SMALL
    }
    assert without_truths == {folder: {where} for folder, where in DICOM_SMALL.items()}
    assert all(name.rpartition("/")[0] in DICOM_SMALL for name in by_file if name not in truths)


def test_the_plans_rule_for_4d_decides_about_the_4d_files_and_no_others(data_root: Path) -> None:
    root = data_root / "nifti_odd"
    refusing = open_cohort(root, plan=VolumePlan(modality="any", four_d="refuse"), split_salt="a")
    mean = open_cohort(root, plan=VolumePlan(modality="any", four_d="mean"), split_salt="a")
    four_d = {"philips_bsd/EPI_asc_CLEAR_201.nii": "four_d", "sct_mit/fmri_r.nii.gz": "four_d"}
    assert outcomes(refusing) == outcomes(mean) | four_d
