"""Fingerprints: an unchanged file is hashed once, a changed one always, and the memo names nothing."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

import client.scans.fingerprints
from client.scans.fingerprints import Fingerprints
from storage.files import write_whole


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once: the tests need not wait two seconds."""
    monkeypatch.setattr(client.scans.fingerprints, "SETTLED_S", -1.0)


def test_an_unchanged_file_is_read_once_over_two_openings(tmp_path: Path, settled: None) -> None:
    file, memo = tmp_path / "Mustermann.nii", tmp_path / "memo.json"
    file.write_bytes(b"voxels")
    first = Fingerprints(memo)
    assert first.sha256(file) == first.sha256(file) == hashlib.sha256(b"voxels").hexdigest()
    assert first.num_read == 1
    first.save()
    second = Fingerprints(memo)
    assert second.sha256(file) == hashlib.sha256(b"voxels").hexdigest()
    assert second.num_read == 0
    assert b"Mustermann" not in memo.read_bytes() and str(tmp_path).encode() not in memo.read_bytes()
    assert stat.S_IMODE(memo.stat().st_mode) == 0o600


def test_a_file_edited_in_place_with_its_size_and_time_put_back_is_read_again(
    tmp_path: Path, settled: None
) -> None:
    file, memo = tmp_path / "scan", tmp_path / "memo.json"
    file.write_bytes(b"before")
    fingerprints = Fingerprints(memo)
    fingerprints.sha256(file)
    fingerprints.save()
    status = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"after!")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert Fingerprints(memo).sha256(file) == hashlib.sha256(b"after!").hexdigest()


def test_a_file_younger_than_the_clocks_grain_is_not_remembered(tmp_path: Path) -> None:
    file, memo = tmp_path / "scan", tmp_path / "memo.json"
    file.write_bytes(b"young")
    fingerprints = Fingerprints(memo)
    fingerprints.sha256(file)
    fingerprints.save()
    again = Fingerprints(memo)
    again.sha256(file)
    assert again.num_read == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"1:2:3:4:5": 7}', b"\xff\xfe"])
def test_a_damaged_memo_is_forgotten_not_trusted(tmp_path: Path, settled: None, content: bytes) -> None:
    file, memo = tmp_path / "scan", tmp_path / "memo.json"
    file.write_bytes(b"voxels")
    memo.write_bytes(content)
    assert Fingerprints(memo).sha256(file) == hashlib.sha256(b"voxels").hexdigest()


def test_files_that_are_gone_are_forgotten(tmp_path: Path, settled: None) -> None:
    memo = tmp_path / "memo.json"
    fingerprints = Fingerprints(memo)
    for name in ("stays", "goes"):
        (tmp_path / name).write_text(name)
        fingerprints.sha256(tmp_path / name)
    fingerprints.save()
    both = memo.stat().st_size
    fingerprints = Fingerprints(memo)
    fingerprints.sha256(tmp_path / "stays")
    fingerprints.save()
    assert memo.stat().st_size < 0.6 * both
    assert Fingerprints(memo).sha256(tmp_path / "goes") == hashlib.sha256(b"goes").hexdigest()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memo.json"
    write_whole(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
