"""How the files of a cache are written and read: in clear and mapped, or sealed (`site.yaml: encrypt_cache`).

Both keep arrays under a header as safetensors has it, and give a reader what it asks for and no more: of a
file in clear the pages that it touches, of a sealed one the chunks that these lie in. Does not do: hold the
key (`cache_keys.py`), say what the arrays are (`latent_set.py`), or know when to write (`encoding.py`).
"""

import math
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from meduet_models.weights import save_weights, written
from storage.files import write_whole
from storage.sealed_files import (
    CHUNK_BYTES,
    DamagedSeal,
    SealedFile,
    SealingKeys,
    open_sealed,
    write_sealed,
)

LARGEST_HEADER = 2**20
_of_thread = threading.local()
Inside = tuple[slice, ...]
"""The part of an array that is asked for: a slice with both ends for each axis."""


class DamagedEncoding(ValueError):
    """A cached file is not what was written; encoding again repairs it."""


@dataclass(frozen=True)
class Place:
    """Where an array lies among the values of a file."""

    begin: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class StoredFile(Protocol):
    """A file whose header was read; its arrays, not."""

    @property
    def head(self) -> bytes:
        """The header: JSON, as safetensors has it."""

    @property
    def size(self) -> int:
        """Bytes of all arrays."""

    def array(self, place: Place, inside: Inside | None = None) -> np.ndarray:
        """An array, or the part of it that is `inside`; only that is read. Not to be written to.

        Raises `DamagedEncoding` when the file went, or is not as it was.
        """

    def copy(self, place: Place, inside: Inside, out: np.ndarray) -> None:
        """The part of an array that is `inside`, copied to `out`, whose rows lie one after the other. Raises
        as `array`."""


@runtime_checkable
class CacheFiles(Protocol):
    """How files of a cache are written and read."""

    def write(self, path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
        """Write arrays and what is said of them, whole or not at all, for the owner alone."""

    def open(self, path: Path) -> StoredFile:
        """Read a file's header. Raises `DamagedEncoding`, and `FileNotFoundError`."""

    def write_text(self, path: Path, text: str) -> None:
        """Write a text, in the same way."""

    def read_text(self, path: Path) -> str:
        """Read it. Raises `DamagedEncoding`, and `FileNotFoundError`."""


@dataclass(frozen=True)
class ClearFile:
    """A file in clear, which is mapped."""

    path: Path
    head: bytes
    size: int

    def array(self, place: Place, inside: Inside | None = None) -> np.ndarray:
        """As `StoredFile`; mapped read-only, so that pages come in as they are touched."""
        begin = 8 + len(self.head) + place.begin
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise damaged(self.path, "is gone") from error
        try:
            if os.fstat(descriptor).st_size < begin + place.num_bytes:
                raise damaged(self.path, "was cut short")  # touching a page behind the end would be a SIGBUS
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        whole = np.frombuffer(mapped, place.dtype, math.prod(place.shape), begin).reshape(place.shape)
        return whole if inside is None else whole[inside]

    def copy(self, place: Place, inside: Inside, out: np.ndarray) -> None:
        """As `StoredFile`."""
        out[...] = self.array(place, inside)


class ClearFiles:
    """Files in clear, readable by their owner."""

    def write(self, path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
        """As `CacheFiles`."""
        save_weights(path, tensors, said)

    def open(self, path: Path) -> ClearFile:
        """As `CacheFiles`."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, LARGEST_HEADER):
                raise damaged(path, "has no header")
            return ClearFile(path, file.read(length), size - 8 - length)

    def write_text(self, path: Path, text: str) -> None:
        """As `CacheFiles`."""
        write_whole(path, text)

    def read_text(self, path: Path) -> str:
        """As `CacheFiles`."""
        return path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class SealedArrays:
    """A sealed file, of which chunks are opened as they are needed."""

    file: SealedFile = field(repr=False)

    @property
    def head(self) -> bytes:
        """As `StoredFile`."""
        return self.file.head[8:]  # without its length

    @property
    def size(self) -> int:
        """As `StoredFile`."""
        return self.file.size

    def array(self, place: Place, inside: Inside | None = None) -> np.ndarray:
        """As `StoredFile`. Memory behind what was not asked for is never touched, so it is not taken."""
        whole = np.empty(place.shape, place.dtype)
        self._fill(whole, place, None if inside is None else _chunks(place, inside))
        return whole if inside is None else whole[inside]

    def copy(self, place: Place, inside: Inside, out: np.ndarray) -> None:
        """As `StoredFile`; all of an array is opened in its place, part of it in memory that a thread
        keeps."""
        if out.shape == place.shape and out.flags.c_contiguous and out.dtype == place.dtype:
            self._fill(out, place, None)
            return
        whole = _room(place)
        self._fill(whole, place, _chunks(place, inside))
        out[...] = whole[inside]

    def _fill(self, whole: np.ndarray, place: Place, chunks: Iterable[int] | None) -> None:
        """A file that does not open is removed: so it is made again, though its header looked whole."""
        buffer = memoryview(whole.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            self.file.fill(buffer, place.begin, chunks)
        except FileNotFoundError as error:
            raise damaged(self.file.path, "is gone") from error
        except DamagedSeal as error:
            self.file.path.unlink(missing_ok=True)
            raise damaged(self.file.path, "does not open") from error


@dataclass(frozen=True)
class SealedFiles:
    """Files that are sealed under the cache's key (`storage/sealed_files.py`)."""

    keys: SealingKeys

    def write(self, path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
        """As `CacheFiles`."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_sealed(path, *written(tensors, said), size, self.keys)

    def open(self, path: Path) -> SealedArrays:
        """As `CacheFiles`."""
        return SealedArrays(self._opened(path))

    def write_text(self, path: Path, text: str) -> None:
        """As `CacheFiles`."""
        content = text.encode()
        write_sealed(path, b"", [content], len(content), self.keys)

    def read_text(self, path: Path) -> str:
        """As `CacheFiles`."""
        try:
            return self._opened(path).values().decode("utf-8", "replace")
        except DamagedSeal as error:
            raise damaged(path, "does not open") from error

    def _opened(self, path: Path) -> SealedFile:
        try:
            return open_sealed(path, self.keys)
        except DamagedSeal as error:
            raise damaged(path, "does not open") from error


def damaged(path: Path, what: str) -> DamagedEncoding:
    """The error of a file that is not as it was written; names no scan."""
    return DamagedEncoding(
        f"Expected {path.name[:12]}… to be as it was written; it {what}. Run `meduet-site prepare` again."
    )


def _room(place: Place) -> np.ndarray:
    """Memory of an array's size that a thread keeps from one scan to the next."""
    kept = getattr(_of_thread, "room", None)
    if kept is None or len(kept) < place.num_bytes:
        kept = _of_thread.room = np.empty(place.num_bytes, np.uint8)
    return np.frombuffer(kept, place.dtype, math.prod(place.shape)).reshape(place.shape)


def _chunks(place: Place, inside: Inside) -> Iterable[int]:
    """The chunks of a file in which the part of an array lies: its rows along the last axis, each whole."""
    steps = [place.dtype.itemsize * math.prod(place.shape[axis + 1 :]) for axis in range(len(place.shape))]
    rows: np.ndarray = np.full((), place.begin, np.int64)
    for part, step in zip(inside[:-1], steps[:-1], strict=True):
        rows = rows[..., None] + step * np.arange(part.start, part.stop)
    rows = rows.reshape(-1)
    if not len(rows) or inside[-1].start >= inside[-1].stop:
        return ()
    first = (rows + steps[-1] * inside[-1].start) // CHUNK_BYTES
    last = (rows + steps[-1] * inside[-1].stop - 1) // CHUNK_BYTES
    pairs = np.unique(np.stack([first, last]), axis=1).T.tolist()
    return sorted({chunk for low, high in pairs for chunk in range(low, high + 1)})
