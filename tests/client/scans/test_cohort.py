"""The cohort: nothing vanishes, nobody is in two splits, and the tables say why."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.scans.cohort import SPLITS, Cohort, open_cohort, read_entry, split_of
from scans.scans import Reason, UnusableScan
from scans.volume_plan import VolumePlan

PLAN = VolumePlan(modality="T1w")
FRACTIONS = (0.8, 0.1, 0.1)


def write(path: Path, seed: int, *, label: bool = False, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    array = generator.integers(0, 3, (5, 6, 7)) if label else generator.normal(size=(5, 6, 7))
    kind = np.uint8 if label else np.float32
    nib.save(nib.Nifti1Image(array.astype(kind), np.eye(4) if affine is None else affine), path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def opened(root: Path, **settings: object) -> Cohort:
    """The cohort of a folder, after checking the law: every file is in exactly one place."""
    cohort = open_cohort(root, plan=PLAN, split_salt="salt", **settings)  # type: ignore[arg-type]
    ended = [file for scan in cohort.scans for file in scan.files]
    ended += [scan.label_path for scan in cohort.scans if scan.label_path is not None]
    ended += [file for exclusion in cohort.exclusions for file in exclusion.all_files]
    present = [p for p in cohort.root.rglob("*") if p.is_file() or p.is_symlink()]
    missing = [e.path for e in cohort.exclusions if e.reason is Reason.MISSING_FILE]
    assert sorted(ended) == sorted(present + missing)
    return cohort


def reasons(cohort: Cohort) -> dict[str, str]:
    return {e.path.relative_to(cohort.root).as_posix(): e.reason.value for e in cohort.exclusions}


def labels(cohort: Cohort) -> dict[str, str | None]:
    return {
        s.path.relative_to(cohort.root).as_posix(): s.label_path.relative_to(cohort.root).as_posix()
        if s.label_path
        else None
        for s in cohort.scans
    }


# splits


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=30), st.text(max_size=4))
def test_a_new_patient_moves_nobody(patients: set[str], salt: str) -> None:
    *known, newcomer = sorted(patients)
    before = {patient: split_of(patient, FRACTIONS, salt) for patient in known}
    after = {patient: split_of(patient, FRACTIONS, salt) for patient in [newcomer, *reversed(known)]}
    assert all(after[patient] == before[patient] for patient in known)


def test_splits_have_the_fractions_asked_for_and_another_salt_gives_other_splits() -> None:
    patients = [f"patient {number}" for number in range(5000)]
    ours = [split_of(patient, FRACTIONS, "a") for patient in patients]
    for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
        # 5 standard deviations: a false alarm in 600,000 runs of a random salt; this salt is fixed.
        assert abs(ours.count(split) / 5000 - fraction) < 5 * (fraction * (1 - fraction) / 5000) ** 0.5
    assert ours != [split_of(patient, FRACTIONS, "b") for patient in patients]


def test_a_patient_with_many_scans_is_in_one_split_and_arrivals_move_nobody(tmp_path: Path) -> None:
    for patient in range(12):
        for scan in range(3):
            write(tmp_path / f"p{patient}" / f"scan{scan}.nii.gz", 100 * patient + scan)
    before = opened(tmp_path, split_fractions=(0.4, 0.3, 0.3))
    assert len(before.scans) == 36 and len(before.patients()) == 12
    splits = [set(before.patients(split)) for split in SPLITS]
    assert all(splits) and sum(map(len, splits)) == 12
    write(tmp_path / "a newcomer" / "scan.nii.gz", 9999)
    after = opened(tmp_path, split_fractions=(0.4, 0.3, 0.3))
    was = {scan.scan_id: scan.split for scan in before.scans}
    assert {s.scan_id: s.split for s in after.scans if s.scan_id in was} == was


def test_sessions_of_one_person_share_a_split(data_root: Path) -> None:
    cohort = open_cohort(data_root / "gm_challenge", plan=VolumePlan(modality="T2starw"), split_salt="a")
    assert len(cohort.scans) == 8 and len(cohort.patients()) == 6
    assert {s.patient for s in cohort.scans if "sub-9709Ses" in s.path.name} == {"sub-9709"}


# real folders


def test_the_hippocampi_are_all_there(data_root: Path) -> None:
    seen = []
    cohort = open_cohort(
        data_root / "msd_hippocampus", plan=PLAN, split_salt="a", progress=lambda *at: seen.append(at)
    )
    assert seen == [(done, 261) for done in range(1, 262)]
    assert cohort.summary()["scans"] == cohort.summary()["patients"] == 261
    assert [s.path.name for s in cohort.scans if s.label_path is None] == ["hippocampus_118.nii.gz"]
    assert reasons(cohort) == {
        "README.md": "sidecar",
        "labels/hippocampus_010.nii.gz": "label_without_image",
        "labels/hippocampus_281.nii.gz": "label_without_image",
    }


def test_a_bids_folder_brings_its_sites_as_covariates(data_root: Path) -> None:
    cohort = open_cohort(data_root / "gm_challenge", plan=VolumePlan(modality="T2starw"), split_salt="a")
    by_name = {scan.path.name.partition("_")[0]: scan for scan in cohort.scans}
    milan = {"sex": "F", "age": 35.0, "Site": "Milan", "Field Strength [T]": 1.5}
    assert by_name["sub-9709Ses1"].covariates == milan
    assert by_name["sub-9604"].covariates == {"sex": "M", "Site": "Philips", "Field Strength [T]": 3.0}
    assert all(s.label_path is not None and "_seg-manual" in s.label_path.name for s in cohort.scans)
    plan = VolumePlan(modality="T2starw")
    other = open_cohort(cohort.root, plan=plan, split_salt="a", label_pattern="gmseg.*")
    assert all(s.label_path is not None and "_gmseg-manual" in s.label_path.name for s in other.scans)


# layouts


def test_plain_folders_pair_labels_by_name_beside_or_apart(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.nii.gz", 1)
    write(tmp_path / "labels" / "a.nii.gz", 1, label=True)
    write(tmp_path / "images" / "b.nii", 2)
    write(tmp_path / "imagesTr" / "n_0000.nii.gz", 3)
    write(tmp_path / "labelsTr" / "n.nii.gz", 3, label=True)
    write(tmp_path / "side" / "c.nii.gz", 4)
    write(tmp_path / "side" / "c_seg.nii.gz", 4, label=True)
    write(tmp_path / "side" / "c_mask.nii.gz", 5, label=True)
    write(tmp_path / "side" / "gone_seg.nii.gz", 6, label=True)
    write(tmp_path / "labels" / "nobody.nii.gz", 7, label=True)
    cohort = opened(tmp_path)
    assert labels(cohort) == {
        "images/a.nii.gz": "labels/a.nii.gz",
        "images/b.nii": None,
        "imagesTr/n_0000.nii.gz": "labelsTr/n.nii.gz",
        "side/c.nii.gz": "side/c_seg.nii.gz",
    }
    assert reasons(cohort) == {
        "side/c_mask.nii.gz": "label_not_chosen",
        "side/gone_seg.nii.gz": "label_without_image",
        "labels/nobody.nii.gz": "label_without_image",
    }
    assert [s.patient for s in cohort.scans] == ["a", "b", "n_0000", "side"]


def test_bids_labels_are_found_by_extension_of_the_name_and_as_dseg(tmp_path: Path) -> None:
    text(tmp_path / "dataset_description.json", "{}")
    for subject, seed in (("sub-1", 1), ("sub-2", 2)):
        write(tmp_path / subject / "ses-1" / "anat" / f"{subject}_ses-1_T1w.nii.gz", seed)
        write(tmp_path / subject / "ses-1" / "anat" / f"{subject}_ses-1_T2w.nii.gz", seed + 10)
    made = tmp_path / "derivatives"
    write(made / "labels" / "sub-1" / "sub-1_ses-1_T1w_seg-manual.nii.gz", 1, label=True)
    write(made / "fs" / "sub-2" / "sub-2_ses-1_desc-aseg_dseg.nii.gz", 1, label=True)
    write(made / "fs" / "sub-2" / "sub-2_ses-1_desc-brain_T1w.nii.gz", 5)
    write(tmp_path / "loose.nii.gz", 6)
    cohort = opened(tmp_path)
    assert labels(cohort) == {
        "sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz": (
            "derivatives/labels/sub-1/sub-1_ses-1_T1w_seg-manual.nii.gz"
        ),
        "sub-2/ses-1/anat/sub-2_ses-1_T1w.nii.gz": None,
    }
    assert reasons(cohort) == {
        "dataset_description.json": "sidecar",
        "sub-1/ses-1/anat/sub-1_ses-1_T2w.nii.gz": "no_such_modality",
        "sub-2/ses-1/anat/sub-2_ses-1_T2w.nii.gz": "no_such_modality",
        "derivatives/fs/sub-2/sub-2_ses-1_desc-aseg_dseg.nii.gz": "label_without_image",  # of T1w or of T2w?
        "derivatives/fs/sub-2/sub-2_ses-1_desc-brain_T1w.nii.gz": "derivative",
        "loose.nii.gz": "no_patient",
    }
    shutil.rmtree(tmp_path / "sub-2" / "ses-1")
    write(tmp_path / "sub-2" / "ses-1" / "anat" / "sub-2_ses-1_T1w.nii.gz", 2)
    assert labels(opened(tmp_path))["sub-2/ses-1/anat/sub-2_ses-1_T1w.nii.gz"] == (
        "derivatives/fs/sub-2/sub-2_ses-1_desc-aseg_dseg.nii.gz"
    )


def test_a_manifest_says_everything_and_what_it_does_not_name_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "x" / "one.nii.gz", 1)
    write(tmp_path / "x" / "one-label.nii.gz", 1, label=True)
    write(tmp_path / "two.nii.gz", 2)
    write(tmp_path / "three.nii.gz", 3)
    write(tmp_path / "unnamed.nii.gz", 4)
    manifest = text(
        tmp_path / "manifest.csv",
        "\ufeffpath,patient,modality,label,age,sex\n"
        "x/one.nii.gz,ann,mprage,x/one-label.nii.gz,61,F\n"
        "two.nii.gz,ann,flair,,61,n/a\n"
        "three.nii.gz,,mprage,,,\n"
        "four.nii.gz,ben,mprage,,,\n",
    )
    for root in (tmp_path, manifest):
        cohort = opened(root, modality_names={"mprage": "T1w"})
        (scan,) = cohort.scans
        assert (scan.patient, scan.covariates) == ("ann", {"age": 61.0, "sex": "F"})
        assert scan.label_path == tmp_path / "x" / "one-label.nii.gz"
        assert reasons(cohort) == {
            "manifest.csv": "table",
            "two.nii.gz": "no_such_modality",
            "three.nii.gz": "no_patient",
            "four.nii.gz": "missing_file",
            "unnamed.nii.gz": "not_in_manifest",
        }


def test_a_manifest_may_name_dicom_series(data_root: Path, tmp_path: Path) -> None:
    source = data_root / "dicom_small/dicom2nifti_tests/tests/data/siemens/anatomical/001"
    shutil.copytree(source, tmp_path / "series", copy_function=shutil.copyfile)
    text(tmp_path / "series" / "notes.txt", "mprage")
    text(tmp_path / "manifest.csv", "path,patient\nseries,ann\n")
    cohort = opened(tmp_path)
    assert [(s.patient, len(s.files)) for s in cohort.scans] == [("ann", 4)]
    assert reasons(cohort) == {"series/notes.txt": "sidecar", "manifest.csv": "table"}
    scan, label = read_entry(cohort.scans[0], PLAN)
    assert scan.array.shape == (256, 256, 4) and label is None


def test_files_that_are_no_scans_are_listed_with_what_they_are(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    text(tmp_path / ".hidden", "x")
    text(tmp_path / ".git" / "config", "x")
    text(tmp_path / "notes.txt", "x")
    text(tmp_path / "empty.bin", "")
    text(tmp_path / "blob.bin", "x" * 400)
    text(tmp_path / "old.img", "x" * 400)
    text(tmp_path / "fake.nii.gz", "x" * 400)
    write(tmp_path / "b.nii", 2).rename(tmp_path / "b.volume")
    (tmp_path / "annexed.nii.gz").symlink_to(tmp_path / "not fetched")
    (tmp_path / "elsewhere").symlink_to(tmp_path / ".git", target_is_directory=True)
    cohort = opened(tmp_path)
    assert len(cohort.scans) == 1
    assert reasons(cohort) == {
        ".hidden": "hidden",
        ".git/config": "hidden",
        "notes.txt": "sidecar",
        "empty.bin": "empty",
        "blob.bin": "not_a_scan",
        "old.img": "unsupported_format",
        "fake.nii.gz": "not_a_scan",
        "b.volume": "wrong_extension",
        "annexed.nii.gz": "broken_link",
        "elsewhere": "linked_folder",
    }


def test_a_dicom_series_in_two_folders_is_refused_whole(data_root: Path, tmp_path: Path) -> None:
    source = data_root / "dicom_small/dicom2nifti_tests/tests/data/ge/dti/002"
    for name in ("001", "002", "003", "004", "101", "102", "103", "104"):
        folder = tmp_path / ("a" if name < "100" else "b")
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    cohort = opened(tmp_path, modality_names={"MR": "T1w"})
    assert not cohort.scans and [e.reason for e in cohort.exclusions] == [Reason.SPLIT_SERIES] * 2


# labels, duplicates, covariates


def test_the_same_voxels_twice_count_once_even_under_another_patient(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    write(tmp_path / "b.nii", 1, affine=np.diag([-1.0, 1, 1, 1]))
    cohort = opened(tmp_path)
    assert [s.patient for s in cohort.scans] == ["a"] and reasons(cohort) == {"b.nii": "duplicate"}


def test_a_label_on_another_grid_is_left_out_and_its_image_stays(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    write(tmp_path / "a_seg.nii.gz", 1, label=True, affine=np.diag([1.0, 1, 2, 1]))
    write(tmp_path / "b.nii.gz", 2)
    write(tmp_path / "b_seg.nii.gz", 2)
    cohort = opened(tmp_path)
    assert labels(cohort) == {"a.nii.gz": None, "b.nii.gz": None}
    assert reasons(cohort) == {"a_seg.nii.gz": "label_mismatch", "b_seg.nii.gz": "label_not_integer"}


def test_the_label_of_an_excluded_image_is_listed_too(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    write(tmp_path / "b.nii.gz", 1)
    write(tmp_path / "b_seg.nii.gz", 1, label=True)
    assert reasons(opened(tmp_path)) == {"b.nii.gz": "duplicate", "b_seg.nii.gz": "label_without_image"}


def test_covariates_of_a_plain_folder_come_from_its_table(tmp_path: Path) -> None:
    write(tmp_path / "ann_1.nii.gz", 1)
    write(tmp_path / "ben_1.nii.gz", 2)
    table = text(tmp_path / "covariates.csv", "patient,age\nann,61\nben,\n")
    cohort = opened(tmp_path, patient_pattern=r"^([a-z]+)_")
    assert {s.patient: s.covariates for s in cohort.scans} == {"ann": {"age": 61.0}, "ben": {}}
    table.write_text("patient,age\nann,61\nann,62\n")
    with pytest.raises(ValueError, match="one row per patient"):
        opened(tmp_path)
    table.write_text("name,age\nann,61\n")
    with pytest.raises(ValueError, match="have a column"):
        opened(tmp_path)


def test_a_scan_whose_patient_the_pattern_does_not_tell_is_excluded(tmp_path: Path) -> None:
    write(tmp_path / "ann_1.nii.gz", 1)
    write(tmp_path / "7.nii.gz", 2)
    assert reasons(opened(tmp_path, patient_pattern=r"^([a-z]+)_")) == {"7.nii.gz": "no_patient"}


def test_a_plain_folder_holds_what_its_map_says(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    assert len(opened(tmp_path, modality_names={"*": "T1w"}).scans) == 1
    assert reasons(opened(tmp_path, modality_names={"*": "CT"})) == {"a.nii.gz": "no_such_modality"}


# tables and settings


def test_tables_say_all_and_the_summary_names_nobody(tmp_path: Path) -> None:
    write(tmp_path / "data" / "jane doe.nii.gz", 1)
    write(tmp_path / "data" / "jane doe_seg.nii.gz", 1, label=True)
    text(tmp_path / "data" / "letter to jane doe.txt", "x")
    text(tmp_path / "data" / "covariates.csv", "patient,age\njane doe,61\n")
    cohort = opened(tmp_path / "data")
    cohort.write_csv(tmp_path / "state")
    with (tmp_path / "state" / "cohort.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["patient"], row["path"], row["label"], row["age"]) == (
        "jane doe", "jane doe.nii.gz", "jane doe_seg.nii.gz", "61.0",
    )  # fmt: skip
    with (tmp_path / "state" / "exclusions.csv").open() as stream:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(stream)}
    assert listed == {"letter to jane doe.txt": "sidecar", "covariates.csv": "table"}
    summary = json.dumps(cohort.summary())
    assert "jane" not in summary and str(tmp_path) not in summary
    assert cohort.summary()["exclusions"] == {"sidecar": 1, "table": 1}


def test_scans_that_prove_unusable_later_move_to_the_exclusions(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    write(tmp_path / "a_seg.nii.gz", 1, label=True)
    write(tmp_path / "b.nii.gz", 2)
    cohort = opened(tmp_path)
    left = cohort.without({cohort.scans[0].scan_id: UnusableScan(Reason.CORRUPT, "later")})
    assert [s.path.name for s in left.scans] == ["b.nii.gz"]
    assert reasons(left) == {"a.nii.gz": "corrupt", "a_seg.nii.gz": "label_without_image"}


def test_a_scan_that_changed_since_is_not_read_as_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", 1)
    cohort = opened(tmp_path)
    write(tmp_path / "a.nii.gz", 2)
    with pytest.raises(UnusableScan, match="changed since"):
        read_entry(cohort.scans[0], PLAN)


def test_a_folder_without_a_usable_scan_is_an_empty_cohort_with_reasons(tmp_path: Path) -> None:
    text(tmp_path / "notes.txt", "x")
    cohort = opened(tmp_path)
    assert not cohort.scans and reasons(cohort) == {"notes.txt": "sidecar"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_fractions": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"patient_pattern": "(("}, "regular expression"),
        ({"patient_pattern": "sub-.*"}, "have a group"),
        ({"label_pattern": "["}, "regular expression"),
        ({"layout": "manifest"}, "Expected a manifest"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.nii.gz", 1)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **change)


def test_a_folder_that_could_be_two_layouts_is_not_guessed(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Name the layout"):
        opened(data_root / "dicom_small")
    with pytest.raises(ValueError, match="nothing is there"):
        opened(tmp_path / "nowhere")
