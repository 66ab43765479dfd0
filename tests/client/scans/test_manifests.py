"""A manifest says everything; a file has one place, whatever way a row writes it."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from client.scans.cohort import Cohort, open_cohort
from scans.scans import Reason
from scans.volume_plan import VolumePlan


def write(path: Path, seed: int, *, label: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    array = generator.normal(size=(5, 6, 7)) if not label else generator.integers(0, 3, (5, 6, 7))
    nib.save(nib.Nifti1Image(array.astype(np.uint8 if label else np.float32), np.eye(4)), path)
    return path


def opened(root: Path, **settings: object) -> Cohort:
    cohort = open_cohort(root, plan=VolumePlan(modality="any"), split_salt="a", **settings)  # type: ignore[arg-type]
    places = Counter(file for scan in cohort.scans for file in scan.files)
    places.update({scan.label_path for scan in cohort.scans} - {None})  # type: ignore[arg-type]
    places.update(file for exclusion in cohort.exclusions for file in exclusion.all_files)
    assert set(places.values()) <= {1}, "one file, one place"
    return cohort


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        write(tmp_path / "scans" / f"{name}.nii.gz", number)
    write(tmp_path / "labels" / "a.nii.gz", 1, label=True)
    return tmp_path


def manifest(folder: Path, *rows: str, header: str = "path,patient") -> Path:
    (folder / "manifest.csv").write_text("\n".join([header, *rows, ""]))
    return folder


@pytest.mark.parametrize(
    "written",
    [
        "scans/a.nii.gz",
        "scans\\a.nii.gz",
        "labels/../scans/a.nii.gz",
        "./scans//a.nii.gz",
        "{folder}/scans/a.nii.gz",
    ],
)
def test_a_row_finds_its_file_however_it_is_written(folder: Path, written: str) -> None:
    cohort = opened(manifest(folder, f"{written.format(folder=folder)},P1"))
    assert [(scan.patient, scan.path) for scan in cohort.scans] == [("P1", folder / "scans" / "a.nii.gz")]
    assert sum(one.reason is Reason.NOT_IN_MANIFEST for one in cohort.exclusions) == 3


def test_a_root_that_is_reached_through_a_link_holds_the_same_files(folder: Path, tmp_path: Path) -> None:
    manifest(folder, f"{folder.resolve()}/scans/a.nii.gz,P1")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(folder, target_is_directory=True)
    assert len(opened(link).scans) == 1


def test_a_file_named_twice_counts_once_and_with_two_patients_it_has_none(folder: Path) -> None:
    cohort = opened(
        manifest(
            folder,
            "scans/a.nii.gz,P1",
            "scans/../scans/a.nii.gz,P1",
            "scans/b.nii.gz,P2",
            "scans/b.nii.gz,P3",
        )
    )
    assert [scan.patient for scan in cohort.scans] == ["P1"]
    assert {one.path.name: one.reason for one in cohort.exclusions}["b.nii.gz"] is Reason.NO_PATIENT
    assert len(cohort.notes) == 2 and "Rows 4 and 5" in cohort.notes[1] and "contradict" in cohort.notes[1]


def test_a_scan_named_as_a_label_stays_a_scan(folder: Path) -> None:
    rows = (
        "scans/a.nii.gz,P1,labels/a.nii.gz",
        "scans/b.nii.gz,P2,scans/c.nii.gz",
        "scans/c.nii.gz,P3,gone.nii.gz",
    )
    cohort = opened(manifest(folder, *rows, header="Path;Patient;Label".replace(";", ",")))
    assert {scan.patient: scan.label_path is not None for scan in cohort.scans} == {
        "P1": True,
        "P2": False,
        "P3": False,
    }
    assert "Row 3 names as its label a file that is a scan" in cohort.notes[0]
    assert {one.path.name: one.reason for one in cohort.exclusions}["gone.nii.gz"] is Reason.MISSING_FILE


def test_rows_that_lead_nowhere_are_counted(folder: Path) -> None:
    cohort = opened(manifest(folder, "scans/a.nii.gz,P1", "D:\\\\scans\\\\b.nii.gz,P2"))
    (join,) = cohort.joins
    assert join.summary == "column patient: 1 of 2 rows have scans, 1 of 1 scans have a row"


def test_the_pattern_tells_in_a_manifest_too(folder: Path) -> None:
    rows = ("scans/a.nii.gz", "scans/b.nii.gz")
    cohort = opened(manifest(folder, *rows, header="path"), patient_pattern=r"scans/(\w)")
    assert [scan.patient for scan in cohort.scans] == ["a", "b"]
    with pytest.raises(ValueError, match="lacks patient"):
        opened(folder)


def test_an_empty_path_is_refused_with_its_row(folder: Path) -> None:
    with pytest.raises(ValueError, match="a path in row 3"):
        opened(manifest(folder, "scans/a.nii.gz,P1", ",P2"))


def test_a_hundred_thousand_rows_open_in_ten_seconds(folder: Path) -> None:
    rows = [f"scans/{number % 3}/{number}.nii.gz,P{number // 2},x" for number in range(100_000)]
    manifest(folder, "scans/a.nii.gz,P0,x", *rows, header="path,patient,site")
    code = (
        "import sys, time; from pathlib import Path; from client.scans.layouts import LayoutRules, survey\n"
        "begin = time.process_time(); found = survey(Path(sys.argv[1]), 'auto', LayoutRules())\n"
        "print(len(found.candidates), len(found.exclusions), time.process_time() - begin)"
    )  # a process of its own: type checks at run time, which tests have, cost more than the work
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    candidates, exclusions, seconds = done.stdout.split()
    assert (candidates, exclusions) == ("1", "100004") and float(seconds) < 10


def dicom(data_root: Path, folder: Path, *series: str) -> None:
    """Slices of these real series, all in one folder."""
    source = data_root / "dicom_small" / "dicom2nifti_tests" / "tests" / "data"
    folder.mkdir()
    for name in series:
        for path in sorted((source / name).iterdir()):
            if path.is_file() and not path.name.endswith(".gz"):
                shutil.copyfile(path, folder / f"{name.replace('/', '_')}_{path.name}")


def test_a_row_that_names_a_folder_of_several_series_is_refused_with_the_reason(
    data_root: Path, tmp_path: Path
) -> None:
    dicom(data_root, tmp_path / "one", "siemens/anatomical/001")
    dicom(data_root, tmp_path / "two", "siemens/anatomical/001", "ge/anatomical/001")
    manifest(tmp_path, "one,ann", "two,ben")
    cohort = opened(tmp_path)
    assert [scan.patient for scan in cohort.scans] == ["ann"]
    (refused,) = [one for one in cohort.exclusions if one.path.name == "two"]
    assert refused.reason is Reason.SEVERAL_SERIES and refused.detail.startswith("2 series in one folder")
    assert set(refused.all_files) == set((tmp_path / "two").iterdir())


def test_what_leaves_a_series_elsewhere_leaves_it_in_a_manifest_too(data_root: Path, tmp_path: Path) -> None:
    source = data_root / "odd_cases" / "dicom"
    for name in ("scout_in_series", "resent_slices"):
        shutil.copytree(source / name, tmp_path / name, copy_function=shutil.copyfile)
    manifest(tmp_path, "scout_in_series,ann", "resent_slices,ben")
    cohort = opened(tmp_path)
    assert {scan.patient: len(scan.files) for scan in cohort.scans} == {"ann": 24, "ben": 8}
    reasons = Counter(one.reason for one in cohort.exclusions)
    assert reasons == {Reason.LOCALIZER: 1, Reason.DUPLICATE: 2, Reason.TABLE: 1}
