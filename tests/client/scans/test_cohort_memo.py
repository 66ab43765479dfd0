"""The cohort memo: the same cohort without reading, and read again whenever anything changed."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import client.scans.cohort_memo
from client.scans.cohort import Cohort, open_cohort
from client.scans.cohort_memo import remembered
from scans.volume_plan import VolumePlan

PLAN = VolumePlan(modality="t1")


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).random((5, 6, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


class Opener:
    """Opens a cohort and counts how often."""

    def __init__(self, root: Path, memo: Path) -> None:
        self.root, self.memo, self.count = root, memo, 0

    def __call__(self, **settings: object) -> Cohort:
        def opened() -> Cohort:
            self.count += 1
            return open_cohort(self.root, plan=PLAN, split_salt="salt")

        return remembered(self.memo, self.root, settings, opened)


@pytest.fixture
def opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
    monkeypatch.setattr(client.scans.cohort_memo, "SETTLED_S", -1.0)  # files just written count as settled
    root = tmp_path / "scans"
    for number in range(3):
        write(tmp_path / "elsewhere" / f"p{number}.nii.gz", number)
    root.mkdir()
    rows = [f"../elsewhere/p{number}.nii.gz,p{number},6{number}" for number in range(3)]
    (root / "manifest.csv").write_text("\n".join(["path,patient,age", *rows, "../elsewhere/gone.nii.gz,x,1"]))
    (root / "README.txt").write_text("for people")
    return Opener(root, tmp_path / "cohort.json")


def test_a_cohort_is_opened_once_and_comes_back_equal(opener: Opener) -> None:
    first = opener()
    assert len(first.scans) == 3 and len(first.exclusions) == 3
    assert opener() == first and opener.count == 1
    assert stat.S_IMODE(opener.memo.stat().st_mode) == 0o600


def edit_in_place(root: Path) -> None:
    path = root.parent / "elsewhere" / "p1.nii.gz"
    before = path.stat()
    write(path, 77)
    os.truncate(path, before.st_size)  # damaged, with its old size and times
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda root: (root / "more.txt").write_text(""),
    "a file less": lambda root: (root / "README.txt").unlink(),
    "another name": lambda root: (root / "README.txt").rename(root / "README.md"),
    "the manifest": lambda root: (root / "manifest.csv").write_text(
        (root / "manifest.csv").read_text().replace("61", "62")
    ),
    "a scan that the manifest names elsewhere": edit_in_place,
    "a scan that was missing": lambda root: write(root.parent / "elsewhere" / "gone.nii.gz", 9),
    "a folder that became a link": lambda root: (root / "linked").symlink_to(root.parent / "elsewhere"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_opens_the_cohort_again(opener: Opener, change: str) -> None:
    opener()
    CHANGES[change](opener.root)
    again = opener()
    assert opener.count == 2
    assert again == open_cohort(opener.root, plan=PLAN, split_salt="salt")


def test_other_settings_or_another_version_of_the_code_open_it_again(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opener(salt="1")
    opener(salt="1")
    assert opener.count == 1
    opener(salt="2")
    assert opener.count == 2
    monkeypatch.setattr(client.scans.cohort_memo, "_CODE", (tmp_path,))
    opener(salt="2")
    assert opener.count == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"below": 1, "cohort": {"root": 1}}', b"\xff"])
def test_a_damaged_memo_is_forgotten(opener: Opener, content: bytes) -> None:
    first = opener()
    opener.memo.write_bytes(content)
    assert opener() == first and opener.count == 2
    assert opener() == first and opener.count == 2


def test_files_younger_than_the_clocks_grain_are_not_remembered(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    opener()
    assert not opener.memo.exists()
