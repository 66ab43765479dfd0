"""Nothing on a disk ends the walk: names in any encoding, pipes, sockets, links, folders that are shut."""

import os
import socket
from pathlib import Path

import pytest

from client.scans.files import walk
from scans.scans import Reason


def reasons(root: Path, follow_links: bool = False) -> dict[str, Reason]:
    return {exclusion.path.name: exclusion.reason for exclusion in walk(root, follow_links).exclusions}


def test_pipes_and_sockets_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name may have 108 bytes
    os.mkfifo("pipe.nii.gz")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.nii")
        assert reasons(tmp_path) == {"pipe.nii.gz": Reason.NOT_A_FILE, "socket.nii": Reason.NOT_A_FILE}


def test_names_in_any_bytes_are_walked(tmp_path: Path) -> None:
    for name in (b"M\xfcller", b"\xff\xfe", "Мюллер".encode("koi8-r"), b"a\nb", "é".encode()):
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        (folder / "t1.nii.gz").write_bytes(b"\x1f\x8b")
    assert len(walk(tmp_path).kinds) == 5


def test_a_link_within_the_root_is_the_file_and_one_that_leads_out_is_followed_only_when_told(
    tmp_path: Path,
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "store").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    for path in (root / "store" / "a.nii", outside / "b.nii", outside / "deep" / "c.nii"):
        path.write_bytes(b"x" * 400)
    (root / "a.nii").symlink_to(root / "store" / "a.nii")
    (root / "b.nii").symlink_to(outside / "b.nii")
    (root / "deep").symlink_to(outside / "deep", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert {path.name for path in walk(root).kinds} == {"a.nii"}
    assert reasons(root) == {
        "b.nii": Reason.LINKED_FILE, "deep": Reason.LINKED_FOLDER, "loop": Reason.LINKED_FOLDER,
    }  # fmt: skip
    assert {path.name for path in walk(root, follow_links=True).kinds} == {"a.nii", "b.nii", "c.nii"}
    assert reasons(root, follow_links=True) == {"loop": Reason.LINKED_FOLDER}


def test_what_was_not_fetched_is_told_from_a_link_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "annexed.nii.gz").symlink_to(".git/annex/objects/aa/MD5E-s2.nii.gz/MD5E-s2.nii.gz")
    (tmp_path / "broken.nii.gz").symlink_to("nowhere")
    (tmp_path / "lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "unlocked.nii.gz").write_text("/annex/objects/MD5E-s2--ab.nii.gz\n")
    assert reasons(tmp_path) == {
        "annexed.nii.gz": Reason.NOT_FETCHED,
        "broken.nii.gz": Reason.BROKEN_LINK,
        "lfs.nii.gz": Reason.NOT_FETCHED,
        "unlocked.nii.gz": Reason.NOT_FETCHED,
    }


def test_a_folder_that_cannot_be_read_is_one_exclusion_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.nii").write_bytes(b"x" * 400)
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refused(path: str) -> object:
        if os.path.basename(path) == "shut":  # noqa: PTH119  tests may run as root, who may read everything
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert reasons(tmp_path) == {"shut": Reason.UNREADABLE}
    assert {path.name for path in walk(tmp_path).kinds} == {"a.nii"}
