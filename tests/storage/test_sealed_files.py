"""Sealed files: whole or refused. Every way to change one is tried, byte by byte where it is small."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.sealed_files import (
    CHUNK_BYTES,
    TAG_BYTES,
    DamagedSeal,
    SealingKeys,
    open_sealed,
    sealed_under,
    write_sealed,
)

KEYS = SealingKeys(bytes(range(32)))
HEAD = b'{"latents": "4 x 24 x 24 x 24"}'
PREFIX = 64
FIRST = PREFIX + len(HEAD) + TAG_BYTES
SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES


def content(size: int) -> bytes:
    return bytes(os.urandom(1021) * (size // 1021 + 1))[:size]


def sealed(folder: Path, name: str, values: bytes, keys: SealingKeys = KEYS) -> Path:
    path = folder / name
    write_sealed(path, HEAD, [values[:1000], memoryview(values)[1000:]], len(values), keys)
    return path


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7])
def test_what_was_sealed_opens_whole_and_in_parts(tmp_path: Path, size: int) -> None:
    values = content(size)
    file = open_sealed(sealed(tmp_path, "a", values), KEYS)
    assert (file.head, file.size, file.values()) == (HEAD, size, values)
    for begin, end in ((0, size // 2), (size // 3, size), (size // 3, 2 * size // 3)):
        part = bytearray(end - begin)
        file.fill(memoryview(part), begin)
        assert part == values[begin:end]


def test_nothing_of_the_content_lies_on_the_disk_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    values = b"a scan of Ms Doe" * 70_000
    path = sealed(tmp_path, "a", values)
    on_disk = path.read_bytes()
    assert b"Doe" not in on_disk and b"latents" not in on_disk
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    clear = tmp_path / "clear"
    clear.write_bytes(HEAD + values)
    assert b"Doe" in clear.read_bytes()  # what this test looks for is found without a seal


def test_only_the_chunks_that_are_needed_are_opened(tmp_path: Path) -> None:
    values = content(3 * CHUNK_BYTES)
    path = sealed(tmp_path, "a", values)
    damaged = bytearray(path.read_bytes())
    damaged[FIRST + SEALED_CHUNK + 5] ^= 1  # the second chunk
    path.write_bytes(damaged)
    file = open_sealed(path, KEYS)
    for begin in (0, 2 * CHUNK_BYTES):
        part = bytearray(CHUNK_BYTES)
        file.fill(memoryview(part), begin)
        assert part == values[begin : begin + CHUNK_BYTES]
    with pytest.raises(DamagedSeal):
        file.fill(memoryview(bytearray(2)), CHUNK_BYTES - 1)
    whole = bytearray(len(values))
    file.fill(memoryview(whole), 0, chunks=[2])
    assert whole[2 * CHUNK_BYTES :] == values[2 * CHUNK_BYTES :] and not any(whole[: 2 * CHUNK_BYTES])


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = sealed(tmp_path, "a", content(40))
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x40
        path.write_bytes(changed)
        with pytest.raises(DamagedSeal):
            open_sealed(path, KEYS).values()
    path.write_bytes(whole)
    open_sealed(path, KEYS).values()


def chunks_exchanged(whole: bytes) -> bytes:
    first, second = FIRST + SEALED_CHUNK, FIRST + 2 * SEALED_CHUNK
    return whole[:FIRST] + whole[first:second] + whole[FIRST:first] + whole[second:]


def chunk_twice(whole: bytes) -> bytes:
    return (
        whole[: FIRST + SEALED_CHUNK]
        + whole[FIRST : FIRST + SEALED_CHUNK]
        + whole[FIRST + 2 * SEALED_CHUNK :]
    )


def last_chunk_cut_off(whole: bytes) -> bytes:
    """With a prefix that says so: as long as it promises."""
    size = int.from_bytes(whole[56:64], "little") - CHUNK_BYTES
    return whole[:56] + size.to_bytes(8, "little") + whole[64 : FIRST + 2 * SEALED_CHUNK]


@pytest.mark.parametrize(
    "change",
    [
        chunks_exchanged,
        chunk_twice,
        last_chunk_cut_off,
        lambda whole: whole[:-1],
        lambda whole: whole[:PREFIX],
        lambda whole: whole[:10],
        lambda whole: b"",
        lambda whole: whole + b"\0",
        lambda whole: whole + whole[-SEALED_CHUNK:],
    ],
)
def test_reordered_cut_and_lengthened_files_do_not_open(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = sealed(tmp_path, "a", content(3 * CHUNK_BYTES))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedSeal):
        open_sealed(path, KEYS).values()


def test_a_file_in_the_place_of_another_does_not_open_nor_does_a_chunk_of_another(tmp_path: Path) -> None:
    one, other = (sealed(tmp_path, name, content(2 * CHUNK_BYTES)) for name in "ab")
    theirs, own = other.read_bytes(), one.read_bytes()
    one.write_bytes(theirs)
    with pytest.raises(DamagedSeal):
        open_sealed(one, KEYS)
    one.write_bytes(own[: FIRST + SEALED_CHUNK] + theirs[FIRST + SEALED_CHUNK :])
    file = open_sealed(one, KEYS)
    with pytest.raises(DamagedSeal):
        file.values()
    again = sealed(tmp_path, "a", content(2 * CHUNK_BYTES))  # the same file, written twice: other salts
    one.write_bytes(own[: FIRST + SEALED_CHUNK] + again.read_bytes()[FIRST + SEALED_CHUNK :])
    with pytest.raises(DamagedSeal):
        open_sealed(one, KEYS).values()


def test_another_key_opens_nothing_and_an_earlier_one_still_does(tmp_path: Path) -> None:
    path = sealed(tmp_path, "a", b"values")
    new = SealingKeys(bytes(32))
    with pytest.raises(DamagedSeal, match="a key that is not here"):
        open_sealed(path, new)
    forged = bytearray(path.read_bytes())  # says that it is under a key that is here
    forged[8:16] = sealed_under(sealed(tmp_path, "b", b"", new)) or b""
    both = SealingKeys(new.current, (KEYS.current,))
    assert open_sealed(path, both).values() == b"values"
    path.write_bytes(forged)
    with pytest.raises(DamagedSeal, match="not as it was written"):
        open_sealed(path, new)


def test_a_prefix_of_random_bytes_is_refused_without_taking_memory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for _ in range(500):
        path.write_bytes(b"MEDUETs1" + os.urandom(os.urandom(1)[0]))
        with pytest.raises(DamagedSeal):
            open_sealed(path, KEYS)
    path.write_bytes(b"MEDUETs1" + bytes(40) + (2**63).to_bytes(8, "little") + bytes(8))
    with pytest.raises(DamagedSeal):
        open_sealed(path, KEYS)
