"""NIfTI-1 and NIfTI-2 files, plain or gzipped, as one array and one affine.

nibabel reads the header; the voxels are streamed volume by volume, so that the memory needed is that of one
volume however long the series, so that nothing is allocated before the header's arithmetic is believed, and
so that a gzip file is read to its end, where its checksum is. (nibabel stops at the last voxel and never sees
the checksum.)

Follows https://nifti.nimh.nih.gov/nifti-1: sform before qform, slope 0 means no scaling. Where the scan lies,
and what happens when the header says it twice and differently: `scans/nifti_place.py`.

Axes: x y z = voxels as stored.
"""

import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from scans.nifti_place import place_of
from scans.scans import (
    TILE,
    FourD,
    Note,
    Reason,
    UnusableScan,
    check_shape,
    combine,
    file_kind,
    has_nifti_magic,
    stacked,
)

NIFTI_NAMES = (".nii", ".nii.gz")
DEFLATE_LIMIT = 1032
"""No deflate stream expands further (RFC 1951: 258 bytes from two bits)."""
NO_INTENSITIES = frozenset({*range(2, 25), *range(1004, 1011), *range(2006, 2010), *range(2016, 2019)})
"""Intent codes of statistics, of vectors and matrices, and of FSL's deformations: no pictures."""
SLACK_BYTES = 2**26
"""Most bytes of header extensions, and most that may follow the last voxel."""


def read_nifti(
    path: Path, four_d: FourD, placeless: bool = False
) -> tuple[Float32[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"], int, tuple[Note, ...]]:
    """Values with slope and intercept applied, affine (RAS+ mm), number of volumes in the file, and what a
    person should look at.

    Raises `UnusableScan`: wrong name, no NIfTI inside, truncated, corrupt, RGB, complex, not 3-D, too large,
    no orientation. Values and affine are not judged here (`scans.accept`). `placeless`: a file with
    neither sform nor qform is read, too; its affine is NaN but for the voxels' edges on the diagonal.
    """
    gzipped = _check_name(path)
    try:
        with path.open("rb") as file:
            unzipped = _Unzipped(file) if gzipped else None
            stream = io.BufferedReader(unzipped, 2**17) if unzipped else file
            array, affine, num_volumes, notes = _read(stream, path.stat().st_size, gzipped, four_d, placeless)
            if unzipped is not None and unzipped.trailing:
                notes = (*notes, Note.TRAILING_BYTES)
            return array, affine, num_volumes, notes
    except EOFError as error:
        raise UnusableScan(Reason.TRUNCATED, "the stream ends early") from error
    except zlib.error as error:
        raise UnusableScan(Reason.CORRUPT, "the checksum fails") from error
    except OSError as error:
        raise UnusableScan(Reason.UNREADABLE, f"errno {error.errno}") from error


def is_nifti_name(path: Path) -> bool:
    """Whether the name claims NIfTI."""
    return path.name.lower().endswith(NIFTI_NAMES)


def nifti_stem(path: Path) -> str:
    """The name without `.nii` or `.nii.gz`."""
    return path.name[: -7 if path.name.lower().endswith(".nii.gz") else -4]


class _Unzipped(io.RawIOBase):
    """What a gzip file holds, checksums compared by zlib; bytes that follow the last stream and begin none
    are `trailing`, not an error (as for gunzip, which warns)."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self._inflate, self._input = file, zlib.decompressobj(31), b""
        self.trailing = False

    def readable(self) -> bool:
        """That it can be read; `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or a part of it; 0 at the end. Raises `EOFError` and `zlib.error`."""
        view = memoryview(buffer)
        while not self._inflate.eof or self._opens_next():
            piece = self._input or self._file.read(2**17)
            found = self._inflate.decompress(piece, len(view))
            self._input = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if found:
                view[: len(found)] = found
                return len(found)
            if not piece and not self._inflate.eof:
                raise EOFError
        return 0

    def _opens_next(self) -> bool:
        """Whether another stream follows; zeros are padding."""
        self._input = self._input.lstrip(b"\0")
        while len(self._input) < 2 and (more := self._file.read(2**17)):
            self._input = (self._input + more).lstrip(b"\0")
        if self._input.startswith(b"\x1f\x8b"):
            self._inflate = zlib.decompressobj(31)
            return True
        self.trailing = bool(self._input)
        return False


def _check_name(path: Path) -> bool:
    """Whether the file is gzipped; refuses content that is not what the name says."""
    kind, name = file_kind(path), path.name.lower()
    if kind == "empty":
        raise UnusableScan(Reason.EMPTY, "no bytes")
    if kind == "gzip" and name.endswith(".nii.gz"):
        return True
    if kind == "nifti" and name.endswith(".nii"):
        return False
    if kind == "gzip" and not name.endswith(".nii"):
        raise UnusableScan(Reason.NOT_A_SCAN)
    if kind == "other":
        with path.open("rb") as stream:
            head = stream.read(349)
        size_of_header = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
        if len(head) < 348 and name.endswith(".nii") and {348, 540} & set(size_of_header):
            raise UnusableScan(Reason.TRUNCATED, "shorter than a header")
        raise UnusableScan(Reason.NOT_A_SCAN)
    raise UnusableScan(Reason.WRONG_EXTENSION, kind)


def _read(
    stream: io.BufferedIOBase, num_file_bytes: int, gzipped: bool, four_d: FourD, placeless: bool
) -> tuple[Float32[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"], int, tuple[Note, ...]]:
    import nibabel as nib  # here and below: a quarter of a second, and most questions read no scan
    from nibabel.spatialimages import HeaderDataError

    head = stream.read(348)
    if head[4:8] == b"n+2\0":
        head += stream.read(540 - 348)
    if not has_nifti_magic(head):
        raise UnusableScan(Reason.NOT_A_SCAN if len(head) >= 348 else Reason.TRUNCATED)
    kind, length = (nib.Nifti1Header, 348) if head[344:348] == b"n+1\0" else (nib.Nifti2Header, 540)
    try:
        # check=False: nibabel's repairs would turn a spacing of zero into 1 mm.
        header = kind.from_fileobj(io.BytesIO(head[:length]), check=False)
        dtype = header.get_data_dtype()
        num_axes, sizes = int(header["dim"][0]), [int(n) for n in header["dim"][1:]]
        offset = float(header["vox_offset"]) or float(length + 4)
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, KeyError) as error:
        raise UnusableScan(Reason.CORRUPT, "the header contradicts itself") from error
    if dtype.names:
        raise UnusableScan(Reason.RGB)
    if dtype.kind == "c":
        raise UnusableScan(Reason.COMPLEX)
    if not (0 <= num_axes <= 7 and dtype.itemsize and dtype.kind in "iuf" and math.isfinite(offset)):
        raise UnusableScan(Reason.CORRUPT, "impossible axes, type or offset")
    if (intent := int(header["intent_code"])) in NO_INTENSITIES:
        raise UnusableScan(Reason.DERIVATIVE, f"intent {intent}: no intensities")
    shape, num_volumes = check_shape(sizes[:num_axes], four_d)
    affine, notes = place_of(header, placeless)

    volume_bytes = math.prod(shape) * dtype.itemsize
    promised = int(offset) + volume_bytes * num_volumes
    if offset < length or offset > length + SLACK_BYTES:
        raise UnusableScan(Reason.CORRUPT, "impossible offset")
    if promised > num_file_bytes * (DEFLATE_LIMIT if gzipped else 1):
        raise UnusableScan(Reason.TRUNCATED, f"{num_file_bytes} bytes cannot hold {promised}")

    if _drain(stream, int(offset) - len(head)) < int(offset) - len(head):
        raise UnusableScan(Reason.TRUNCATED, "ends before the voxels")
    volumes = (
        _slabs(stream, shape, dtype, (slope, intercept), f"volume {index + 1} of {num_volumes}")
        for index in range(num_volumes)
    )
    if four_d == "first":
        array = stacked(next(volumes), shape)
    else:
        array = combine((np.concatenate(list(slabs), axis=2) for slabs in volumes), four_d)
    left = (num_volumes - 1) * volume_bytes if four_d == "first" else 0
    if left and _drain(stream, left) < left:
        raise UnusableScan(Reason.TRUNCATED, f"{num_volumes} volumes promised")
    if _drain(stream, SLACK_BYTES + 1) > SLACK_BYTES:  # to the end: the checksum of gzip
        raise UnusableScan(Reason.CORRUPT, "more bytes than the header promises")
    return array, affine, num_volumes, notes


def _slabs(
    stream: io.BufferedIOBase,
    shape: tuple[int, int, int],
    dtype: np.dtype[np.generic],
    scaling: tuple[float | None, float | None],
    which: str,
) -> Iterator[np.ndarray]:
    """One volume, a few slices at a time: its values, scaled."""
    slope, intercept = scaling
    for first in range(0, shape[2], TILE[1]):
        slab = (shape[0], shape[1], min(TILE[1], shape[2] - first))
        content = bytearray(math.prod(slab) * dtype.itemsize)
        filled = 0
        while filled < len(content):
            count = stream.readinto(memoryview(content)[filled : filled + 2**20])
            if not count:
                raise UnusableScan(Reason.TRUNCATED, f"ends in {which}")
            filled += count
        array = np.frombuffer(content, dtype).reshape(slab, order="F")  # x y z
        if slope is None or scaling == (1.0, 0.0):
            yield array
        else:
            yield array * np.float64(slope) + np.float64(intercept or 0.0)


def _drain(stream: io.BufferedIOBase, limit: int) -> int:
    """Read on, keeping nothing, to the end or to `limit` bytes; returns how many there were."""
    count = 0
    while count < limit and (piece := stream.read(min(2**20, limit - count))):
        count += len(piece)
    return count
