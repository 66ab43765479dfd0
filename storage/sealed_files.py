"""A sealed file: AES-256-GCM in chunks of 1 MiB, of which a reader opens only those that it needs.

A file is a clear prefix (form, key's number, salt, lengths), then its head, then its values, each chunk with
a tag. The chunks are sealed under a key of the file's own, HKDF of the key, the salt, the whole prefix and
the file's name; the number of a chunk is its nonce. So nothing of it opens that was changed, cut, lengthened,
put elsewhere in the file, or taken from another file, and no nonce is ever used twice.
Does not do: hold a key (`client/latents/cache_keys.py`), hide a file's name, length or age, or notice that a
file was replaced by an older one of the same name.
Source: STREAM (Hoang et al., CRYPTO 2015) as Tink's streaming AEAD AES256_GCM_HKDF_1MB has it.
"""

import hashlib
import os
import secrets
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from storage.files import whole_file

CHUNK_BYTES = 2**20
KEY_BYTES, TAG_BYTES = 32, 16
_MAGIC = b"MEDUETs1"
_PREFIX = struct.Struct("<8s8s32sQQ")  # form, key's number, salt, bytes of the head, bytes of the values
LONGEST_HEAD = 2**20
_of_thread = threading.local()


class DamagedSeal(ValueError):
    """A sealed file is not what was written, or no key here opens it."""


@dataclass(frozen=True)
class SealingKeys:
    """The key that files are sealed under, and earlier ones that still open what was not sealed anew."""

    current: bytes = field(repr=False)
    earlier: tuple[bytes, ...] = field(default=(), repr=False)

    def of(self, number: bytes) -> bytes | None:
        """The key of this number."""
        return next((key for key in (self.current, *self.earlier) if key_number(key) == number), None)


def key_number(key: bytes) -> bytes:
    """Eight bytes by which a key is known; they tell nothing of it."""
    return hashlib.sha256(b"fedmeduet sealing key\0" + key).digest()[:8]


@dataclass(frozen=True)
class SealedFile:
    """A sealed file whose head was opened; its values, not."""

    path: Path
    key: bytes
    """Number of the key that it is sealed under."""
    head: bytes
    size: int
    """Bytes of its values."""
    _cipher: AESGCM = field(repr=False)

    def fill(self, buffer: memoryview, begin: int, chunks: Iterable[int] | None = None) -> None:
        """Open values from byte `begin` on into `buffer`: of all chunks that these lie in, or of `chunks`
        alone, the rest of the buffer left as it is.

        Raises `DamagedSeal`, and `FileNotFoundError` when the file went.
        """
        end = begin + len(buffer)
        if not 0 <= begin <= end <= self.size:
            raise DamagedSeal(f"Expected values within {self.size} bytes; asked for {begin} to {end}.")
        if chunks is None:
            chunks = range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES))
        sealed, clear = _scratch()
        first = _PREFIX.size + len(self.head) + TAG_BYTES
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for chunk in chunks:
                low = chunk * CHUNK_BYTES
                length = min(CHUNK_BYTES, self.size - low)
                part = sealed[: length + TAG_BYTES]
                if os.preadv(descriptor, [part], first + chunk * (CHUNK_BYTES + TAG_BYTES)) < len(part):
                    raise DamagedSeal("The sealed file was cut short.")
                if begin <= low and low + length <= end:
                    _open(self._cipher, chunk + 1, part, buffer[low - begin : low - begin + length])
                    continue
                _open(self._cipher, chunk + 1, part, clear[:length])
                start, stop = max(begin, low), min(end, low + length)
                if start < stop:
                    buffer[start - begin : stop - begin] = clear[start - low : stop - low]
        finally:
            os.close(descriptor)

    def values(self) -> bytearray:
        """All values. Raises as `fill`."""
        content = bytearray(self.size)
        self.fill(memoryview(content), 0)
        return content


def write_sealed(
    path: Path, head: bytes, values: Iterable[bytes | memoryview], size: int, keys: SealingKeys
) -> None:
    """Seal `head` and `values`, `size` bytes in all pieces, under the current key and the name of `path`:
    written whole or not at all, for its owner alone."""
    assert len(head) <= LONGEST_HEAD, "a head says what is in a file"
    salt = secrets.token_bytes(32)
    prefix = _PREFIX.pack(_MAGIC, key_number(keys.current), salt, len(head), size)
    cipher = _cipher(keys.current, salt, prefix, path.name)
    with whole_file(path) as file:
        file.write(prefix)
        file.write(cipher.encrypt(_nonce(0), head, None))
        written = 0
        for number, chunk in enumerate(_chunks(values), start=1):
            file.write(cipher.encrypt(_nonce(number), chunk, None))
            written += len(chunk)
        assert written == size, "the prefix says how many"


def open_sealed(path: Path, keys: SealingKeys) -> SealedFile:
    """Open the head of a sealed file. Raises `DamagedSeal`, and `FileNotFoundError`."""
    with path.open("rb") as file:
        prefix, length = file.read(_PREFIX.size), os.fstat(file.fileno()).st_size
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            raise DamagedSeal("Expected a sealed file; got another.")
        _, number, salt, of_head, size = _PREFIX.unpack(prefix)
        chunks = -(-size // CHUNK_BYTES)
        if of_head > LONGEST_HEAD or length != _PREFIX.size + of_head + size + (1 + chunks) * TAG_BYTES:
            raise DamagedSeal("Expected a sealed file as long as its prefix says; got another length.")
        if (key := keys.of(number)) is None:
            raise DamagedSeal("The file is sealed under a key that is not here.")
        sealed = file.read(of_head + TAG_BYTES)
    cipher = _cipher(key, salt, prefix, path.name)
    head = bytearray(of_head)
    _open(cipher, 0, memoryview(sealed), memoryview(head))
    return SealedFile(path, number, bytes(head), size, cipher)


def sealed_under(path: Path) -> bytes | None:
    """Number of the key that a file says it is sealed under; None when it is no sealed file."""
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
    return prefix[8:16] if len(prefix) == _PREFIX.size and prefix.startswith(_MAGIC) else None


def _scratch() -> tuple[memoryview, memoryview]:
    """Room for a sealed chunk and for an opened one, kept by each thread: memory that is new to a process
    costs more than the decryption."""
    if not hasattr(_of_thread, "room"):
        _of_thread.room = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES)), memoryview(bytearray(CHUNK_BYTES))
    room: tuple[memoryview, memoryview] = _of_thread.room
    return room


def _cipher(key: bytes, salt: bytes, prefix: bytes, name: str) -> AESGCM:
    info = b"fedmeduet sealed file\0" + prefix + name.encode("utf-8", "surrogateescape")
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key))


def _nonce(chunk: int) -> bytes:
    return chunk.to_bytes(12, "big")


def _open(cipher: AESGCM, chunk: int, sealed: memoryview, into: memoryview) -> None:
    try:
        cipher.decrypt_into(_nonce(chunk), sealed, None, into)
    except (InvalidTag, ValueError):
        raise DamagedSeal("The sealed file is not as it was written.") from None


def _chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The bytes of all pieces, one after the other, in chunks."""
    waiting = bytearray()
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while len(view):
            taken = min(len(view), CHUNK_BYTES - len(waiting))
            waiting += view[:taken]
            view = view[taken:]
            if len(waiting) == CHUNK_BYTES:
                yield bytes(waiting)
                waiting.clear()
    if waiting:
        yield bytes(waiting)
