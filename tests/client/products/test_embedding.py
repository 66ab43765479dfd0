"""`meduet embed`: files, folders and manifests in, arrays out; one line for what cannot be."""

import io
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

import meduet_models
from client.weights_cli import main
from federation.terminal import terminal
from tests.published_weights import a_scan, published, written


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return published(tmp_path / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three scans, a segmentation of one, and a text."""
    made = tmp_path / "scans"
    (made / "later").mkdir(parents=True)
    for number, name in enumerate(("p1.nii.gz", "p2.nii.gz", "later/p3.nii.gz")):
        written(made / name, *a_scan(number))
    array, affine = a_scan(0)
    written(made / "p1_seg.nii.gz", array > 500, affine, dtype=np.uint8)
    (made / "README.md").write_text("Scans.")
    return made


def said(*arguments: object) -> tuple[int, str]:
    told = io.StringIO()
    status = main([str(argument) for argument in ("embed", *arguments)], terminal(file=told))
    return status, told.getvalue()


def test_one_scan_as_a_container_is_asked(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDUET_MODEL", str(run))
    status, told = said("--input", folder / "p1.nii.gz", "--output", tmp_path / "out.npy")
    assert status == 0 and "Patient data" in told and "not signed" in told
    code = np.load(tmp_path / "out.npy")
    assert code.ndim == 1 and code.dtype == np.float32
    assert np.array_equal(code, meduet_models.load(run).embed(folder / "p1.nii.gz"))
    assert stat.S_IMODE((tmp_path / "out.npy").stat().st_mode) == 0o600


def test_a_folder_as_files_as_arrays_and_as_a_table_is_the_same(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    names = ["later/p3", "p1", "p2"]
    assert said(folder, "--model", run, "-o", tmp_path / "out")[0] == 0
    each = {name: np.load(tmp_path / "out" / f"{name}.npy") for name in names}
    assert said(folder, "--model", run, "-o", tmp_path / "all.npz")[0] == 0
    arrays = np.load(tmp_path / "all.npz")
    assert sorted(arrays["ids"].tolist()) == names
    for name, code in zip(arrays["ids"].tolist(), arrays["code"], strict=True):
        assert np.array_equal(code, each[name])
    status, told = said(folder, "--model", run, "-o", tmp_path / "all.csv")
    assert status == 0 and "README.md: sidecar" in told
    header, *rows = (tmp_path / "all.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["id", "code_0"]
    for row in rows:
        name, *values = row.split(",")
        assert np.array_equal(np.array(values, np.float32), each[name])


def test_a_manifest_names_the_scans(run: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "some.csv").write_text("path,patient\np2.nii.gz,b\nlater/p3.nii.gz,c\n")
    assert said(folder / "some.csv", "--model", run, "-o", tmp_path / "out.npz")[0] == 0
    assert sorted(np.load(tmp_path / "out.npz")["ids"].tolist()) == ["later/p3", "p2"]


def test_a_dicom_series_is_one_scan(run: Path, data_root: Path, tmp_path: Path) -> None:
    tests = data_root / "dicom_small" / "dicom2nifti_tests"
    series = tests / "tests" / "data" / "ge" / "anatomical" / "001"
    copied = shutil.copytree(series, tmp_path / "series", ignore=shutil.ignore_patterns("*.nii*"))
    status, told = said(copied, "--model", run, "-o", tmp_path / "out.npy")
    assert status == 0, told
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()


@pytest.mark.parametrize(("what", "shape"), [("tokens", (2, 3, 2, 24)), ("style", (4,)), ("content", (24,))])
def test_what_else_can_be_asked(
    run: Path, folder: Path, tmp_path: Path, what: str, shape: tuple[int, ...]
) -> None:
    out = tmp_path / "out.npy"
    assert said(folder / "p1.nii.gz", "--model", run, "-o", out, "--what", what)[0] == 0
    assert np.load(out).shape == shape


def test_a_scan_that_is_none_stops_no_other_and_is_said(run: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8bnothing")
    array, affine = a_scan()
    segmentation = written(tmp_path / "only_a_mask.nii.gz", array > 500, affine, dtype=np.uint8)
    status, told = said(
        folder / "broken.nii.gz", segmentation, folder / "p1.nii.gz", "--model", run, "-o", tmp_path / "out"
    )
    assert status == 1
    assert "broken.nii.gz" in told and "two_valued" in told
    assert [path.name for path in (tmp_path / "out").rglob("*.npy")] == ["p1.npy"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("absent.nii.gz", "-o", "out.npy"), "nothing is there"),
        (("SCANS", "-o", "out.npy"), "a folder, .npz or .csv for 3 scans"),
        (("SCANS", "-o", "out.csv", "--what", "tokens"), "tokens, which are a grid"),
        (("SCANS/p1.nii.gz", "SCANS/p1.nii.gz", "-o", "out.csv"), "two are called p1"),
        (("SCANS/p1.nii.gz", "-o", "out.nii.gz"), "a scan's name"),
        (("-o", "out.npy"), "got none"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    run: Path, folder: Path, arguments: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    given = [a.replace("SCANS", str(folder)) for a in arguments]
    given = [str(tmp_path / a) if a.startswith("out.") else a for a in given]
    status, told = said(*given, "--model", run)
    assert status == 2
    assert line in " ".join(told.split()) and len(told.strip().splitlines()) == 1
