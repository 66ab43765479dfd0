"""Every row of `odd_cases`, and what should become of it. All inputs are synthetic.

`OTHERS` lists the rows that belong to volumes and headers (`test_volumes_of_odd_cases.py`), so that no row is
forgotten: together the two lists are the table.
"""

import io
import re
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from client.checks.intake import closing
from client.cli import main
from client.scans.cohort import Cohort, open_cohort
from scans.scans import Reason
from scans.volume_plan import VolumePlan

NAMES = {"MR": "any", "CT": "any", "T1w": "any"}
OTHERS = {
    "nifti/qfac0.nii",
    "nifti/quat_rounding.nii",
    "nifti/sform_without_scale.nii.gz",
    "nifti/units_micron.nii",
    "nifti/gz_trailing_garbage.nii.gz",
    "nifti/ct_offset_1024.nii.gz",
    "nifti/nan_background.nii.gz",
    "dicom/instance_numbers_restart",
    "dicom/two_patients_one_uid",
    "dicom/no_preamble",
    "dicom/scout_in_series",
    "dicom/resent_slices",
    "settings/octal.yaml",
    "settings/duplicate_key.yaml",
    "settings/plan_overrides.txt",
}
"""Rows of the table that other test files hold."""
HERE = {
    "labels/float",
    "labels/v255",
    "dicom/blank_patient",
    "dicom/same_patient_id",
    "layouts/dated_visits",
    "layouts/nnunet_channels",
    "layouts/sub_hyphen",
    "layouts/bids_part",
    "layouts/bids_rawdata",
    "layouts/names_latin1.tar",
    "layouts/datalad.tar",
    "layouts/fifo.tar",
    "manifests/man_latin1",
    "manifests/man_semicolon",
    "manifests/man_windows",
}


@pytest.fixture
def odd(data_root: Path) -> Path:
    folder = data_root / "odd_cases"
    if not folder.is_dir():
        pytest.skip(f"needs odd_cases in {data_root}")
    return folder


def opened(root: Path, modality: str = "any", **settings: object) -> Cohort:
    plan = VolumePlan(modality=modality)
    return open_cohort(root, plan=plan, split_salt="a", modality_names=NAMES, **settings)  # type: ignore[arg-type]


def by_patient(cohort: Cohort) -> dict[str, int]:
    found: dict[str, int] = {}
    for scan in cohort.scans:
        found[scan.patient] = found.get(scan.patient, 0) + 1
    return found


def reasons(cohort: Cohort) -> dict[str, Reason]:
    return {exclusion.path.name: exclusion.reason for exclusion in cohort.exclusions}


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, encoding="utf-8", errors="surrogateescape") as tar:
        tar.extractall(folder, filter="fully_trusted")
    return folder / archive.stem


def test_every_row_of_the_table_has_its_test(odd: Path) -> None:
    rows = re.findall(r"^\| (\S+/\S+) \|", (odd / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 30 and set(rows) == HERE | OTHERS


def test_a_label_off_by_a_rounding_is_rounded(odd: Path) -> None:
    (scan,) = opened(odd / "labels" / "float").scans
    assert scan.label_path is not None


def test_a_label_of_0_and_255_is_a_label(odd: Path) -> None:
    (scan,) = opened(odd / "labels" / "v255").scans
    assert scan.label_path is not None  # what fine-tuning says of 255: tests/client/latents/test_labelled.py


def test_without_a_patient_id_the_folders_tell(odd: Path) -> None:
    cohort = opened(odd / "dicom" / "blank_patient")
    assert by_patient(cohort) == {"SUBJ01": 1, "SUBJ02": 1, "SUBJ03": 1}
    assert "empty PatientID" in " ".join(cohort.patient_map.doubts)


def test_the_pattern_tells_in_dicom_too_and_one_that_matches_nothing_is_an_error(odd: Path) -> None:
    folder = odd / "dicom" / "blank_patient"
    assert set(by_patient(opened(folder, patient_pattern=r"SUBJ(\d+)"))) == {"01", "02", "03"}
    with pytest.raises(ValueError, match="matches none of 3"):
        opened(folder, patient_pattern=r"PAT(\d+)")


def test_one_placeholder_in_three_folders_is_not_one_person_in_silence(odd: Path) -> None:
    cohort = opened(odd / "dicom" / "same_patient_id")
    assert set(by_patient(cohort)) == {"SUBJ01", "SUBJ02", "SUBJ03"}
    assert "ANONYMOUS, which names nobody" in " ".join(cohort.patient_map.doubts)


def test_four_persons_with_two_dated_visits_are_four_patients(odd: Path) -> None:
    cohort = opened(odd / "layouts" / "dated_visits")
    assert by_patient(cohort) == {f"P00{number}": 2 for number in range(1, 5)}
    assert all(len({scan.split for scan in scans}) == 1 for scans in _by_patient(cohort))
    assert len(cohort.studies()) == 8
    assert cohort.patient_map.guess() == "4 patients, e.g. P001/2019-03-04_1/t1.nii.gz is patient P001"


def _by_patient(cohort: Cohort) -> list[list[object]]:
    return [[scan for scan in cohort.scans if scan.patient == patient] for patient in cohort.patients()]


def test_channels_are_contrasts_of_one_patient(odd: Path) -> None:
    folder = odd / "layouts" / "nnunet_channels"
    cohort = opened(folder)
    assert by_patient(cohort) == {f"CASE_00{number}": 2 for number in (1, 2, 3)}
    assert {scan.modality for scan in cohort.scans} == {"0000", "0001"}
    names = {"0000": "t1", "0001": "t2"}
    plan = VolumePlan(modality="t1")
    selected = open_cohort(folder, plan=plan, split_salt="a", modality_names=names)
    assert len(selected.scans) == 3 and all("_0000" in scan.path.name for scan in selected.scans)
    assert all(scan.label_path is not None for scan in selected.scans)
    assert reasons(selected)["CASE_001_0001.nii.gz"] is Reason.NO_SUCH_MODALITY
    unnamed = open_cohort(folder, plan=plan, split_salt="a")
    assert not unnamed.scans, "channel 0000 is not taken for a T1 because nobody said otherwise"


def test_a_subject_with_a_hyphen_is_whole(odd: Path) -> None:
    assert set(by_patient(opened(odd / "layouts" / "sub_hyphen"))) == {f"sub-HUB-00{n}" for n in (1, 2, 3)}


def test_a_phase_map_is_no_t1_and_01_is_sub_01(odd: Path) -> None:
    cohort = opened(odd / "layouts" / "bids_part")
    assert [scan.path.name for scan in cohort.scans] == [f"sub-0{n}_part-mag_T1w.nii.gz" for n in (1, 2)]
    assert reasons(cohort)["sub-01_part-phase_T1w.nii.gz"] is Reason.NO_SUCH_MODALITY
    assert [scan.covariates for scan in cohort.scans] == [{"age": 30.0}, {"age": 40.0}]
    (join,) = cohort.joins
    assert join.summary == "column participant_id: 2 of 2 rows have scans, 4 of 4 scans have a row"


def test_raw_data_below_rawdata_are_found(odd: Path) -> None:
    assert set(by_patient(opened(odd / "layouts" / "bids_rawdata"))) == {"sub-01", "sub-02"}


def test_a_name_in_latin_1_is_read(odd: Path, tmp_path: Path) -> None:
    cohort = opened(unpacked(odd / "layouts" / "names_latin1.tar", tmp_path))
    assert by_patient(cohort) == {"Müller": 1}
    cohort.write_csv(tmp_path / "state")
    assert "Müller/t1.nii.gz" in (tmp_path / "state" / "cohort.csv").read_text(encoding="utf-8")


def test_an_annexed_file_that_was_not_fetched_is_named_so(odd: Path, tmp_path: Path) -> None:
    cohort = opened(unpacked(odd / "layouts" / "datalad.tar", tmp_path))
    assert set(by_patient(cohort)) == {"sub-01", "sub-02"}
    assert reasons(cohort)["sub-03_T1w.nii.gz"] is Reason.NOT_FETCHED


def test_a_pipe_is_not_opened(odd: Path, tmp_path: Path) -> None:
    cohort = opened(unpacked(odd / "layouts" / "fifo.tar", tmp_path))
    assert by_patient(cohort) == {"P1": 1} or len(cohort.scans) == 1
    assert reasons(cohort)["pipe"] is Reason.NOT_A_FILE


@pytest.mark.parametrize(
    ("name", "note", "patients"),
    [
        ("man_latin1", "read as Latin-1", {"Müller", "P2"}),
        ("man_semicolon", "separated by semicolons", {"P1", "P2"}),
        ("man_windows", "", {"P1", "P2"}),
    ],
)
def test_manifests_as_spreadsheets_save_them_are_read(
    odd: Path, name: str, note: str, patients: set[str]
) -> None:
    cohort = opened(odd / "manifests" / name)
    assert set(by_patient(cohort)) == patients
    (join,) = cohort.joins
    assert join.note == note


def test_check_shows_the_guess_and_ends_with_the_sums(odd: Path, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        f"name: north\ndata_root: {odd / 'layouts' / 'dated_visits'}\nstate_dir: state\n"
        "allow_non_private: true\nplan_approval: implied\nminimum_cohort: 5\n"
    )
    screen = io.StringIO()
    main(["check", "--config", str(tmp_path / "site.yaml")], Console(file=screen, width=300, soft_wrap=True))
    said = screen.getvalue()
    assert "4 patients, e.g. P001/2019-03-04_1/t1.nii.gz is patient P001" in said
    assert "Files: 8 seen; maybe in: 8 files of 8 scans, 0 labels; 0 tables read; 0 left out" in said
    assert "Patients: 4, by this rule: a patient is a folder of the data root" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "resent_slices",
            "10 seen; in: 8 files of 1 scans, 0 labels; 0 tables read; 2 left out (duplicate 2).",
        ),
        (
            "scout_in_series",
            "25 seen; in: 24 files of 1 scans, 0 labels; 0 tables read; 1 left out (localizer 1).",
        ),
    ],
)
def test_the_last_lines_count_files_as_seen_in_and_left_out(odd: Path, name: str, said: str) -> None:
    cohort = opened(odd / "dicom" / name)
    assert next(closing(cohort, cohort.patient_map, [])) == f"Files: {said}"


def test_the_last_lines_count_all_files_of_a_series_that_is_left_out(odd: Path) -> None:
    cohort = opened(odd / "dicom" / "same_patient_id", modality="CT")
    said = next(closing(cohort, cohort.patient_map, []))
    assert "24 seen; in: 0 files" in said and "24 left out (no_such_modality 24)" in said
