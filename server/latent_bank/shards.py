"""Encrypted records of one size, in a few large files that are read through memory mapping.

AES-256-GCM (`cryptography`): a random nonce, the record, a tag. The header of a record, which lies in the
index, is authenticated with it: a record that was changed, moved or swapped does not open. A record is on the
disk when `write` returns; whoever keeps the index says afterwards that it is there, so that a torn record is
never looked at and its place is taken again. What this file does not do: know what a record holds, or which
places are taken (`latent_index.py`).

Erasing overwrites the record. On a disk that writes elsewhere (SSD, copy on write) the old bytes may survive
below the file system: they are encrypted, and removing the key removes all of them.
"""

import mmap
import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.files import private_folder

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
SHARD_BYTES = 2**30


class DamagedRecord(ValueError):
    """A record is not what was written in its place."""


def read_key(path: Path, create: bool) -> bytes:
    """The key in a file that only its owner may read; with `create`, made when there is no file.

    Raises `ValueError` when the file is absent, others may read it, or it holds no key.
    """
    if not path.is_file():
        if not create:
            raise ValueError(
                f"Expected the bank's key at {path}; there is none. Restore it: nothing opens without."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise ValueError(
            f"Expected the key {path} to be its owner's alone (0600); its mode is {mode:o}. If others may "
            "have read it, the bank is no longer secret; otherwise chmod 600."
        )
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected {KEY_BYTES} bytes of key in {path}; got {len(key)}.")
    return key


class Shards:
    """The record files in a folder. Not made for several threads at once."""

    def __init__(self, folder: Path, key: bytes, record_bytes: int, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._cipher = folder, AESGCM(key)
        self._stored = NONCE_BYTES + record_bytes + TAG_BYTES
        self._per_shard = max(1, shard_bytes // self._stored)
        self._mapped: dict[int, mmap.mmap] = {}

    def place(self, slot: int) -> tuple[int, int]:
        """Shard and record of a slot; slots are counted through all shards."""
        return divmod(slot, self._per_shard)

    def write(self, first: int, records: Sequence[tuple[bytes, bytes]]) -> None:
        """Write records, as header and content, to the slots from `first` on; on the disk when it returns."""
        private_folder(self._folder)
        slot, left = first, list(records)
        while left:
            shard, record = self.place(slot)
            mine, left = left[: self._per_shard - record], left[self._per_shard - record :]
            content = bytearray()
            for header, plain in mine:
                nonce = secrets.token_bytes(NONCE_BYTES)
                content += nonce + self._cipher.encrypt(nonce, plain, header)
            self._put(shard, [(record, bytes(content))])
            slot += len(mine)
        self._sync_folder()

    def read(self, slot: int, header: bytes, into: memoryview) -> None:
        """Decrypt a record into a buffer of its size. Raises `DamagedRecord`."""
        shard, record = self.place(slot)
        begin = record * self._stored
        mapped = self._map(shard, begin + self._stored)
        nonce = mapped[begin : begin + NONCE_BYTES]
        with memoryview(mapped) as view, view[begin + NONCE_BYTES : begin + self._stored] as sealed:
            try:
                self._cipher.decrypt_into(nonce, sealed, header, into)
            except InvalidTag:
                raise DamagedRecord(f"Record {record} of shard {shard} is not as it was written.") from None

    def erase(self, slots: Sequence[int]) -> None:
        """Overwrite records; on the disk when it returns."""
        shards: dict[int, list[int]] = defaultdict(list)
        for shard, record in map(self.place, slots):
            shards[shard].append(record)
        for shard, records in shards.items():
            if self._path(shard).is_file():
                self._put(shard, [(record, bytes(self._stored)) for record in records])

    def _put(self, shard: int, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Write bytes from these records of a shard on."""
        handle = os.open(self._path(shard), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            for record, content in pieces:
                done = os.pwrite(handle, content, record * self._stored)
                while done < len(content):  # Linux writes at most 2 GiB at once
                    done += os.pwrite(handle, content[done:], record * self._stored + done)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _map(self, shard: int, end: int) -> mmap.mmap:
        """The shard's file, mapped up to `end` at least."""
        mapped = self._mapped.get(shard)
        if mapped is None or len(mapped) < end:
            try:
                with self._path(shard).open("rb") as file:
                    if os.fstat(file.fileno()).st_size < end:
                        raise DamagedRecord(f"Shard {shard} was cut short.")
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                raise DamagedRecord(f"Shard {shard} is gone.") from None
            self._mapped[shard] = mapped
        return mapped

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.shard"

    def _sync_folder(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)  # the files' names survive a power cut too
        finally:
            os.close(handle)
