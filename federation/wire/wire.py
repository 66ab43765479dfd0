"""Tensors on the wire: named tensors as Flower arrays and back, and what can be wrong with a message.

float32 and float64 travel as they are, bfloat16 as uint16 bits (numpy has no bfloat16), MXINT8 as whole
numbers and exponents (`federation/wire/microscaling.py`); integers and booleans never travel, but for the
masked vector of a secure sum (uint32), in its own message. A model is a few
arrays, not one per tensor: Flower asks for, sends and confirms each array and each piece of one by itself, so
80 tensors were 164 requests. What this file does not do: it knows no message (`federation/wire/messages.py`).
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from federation.plan.plan import WireDtype
from federation.wire import microscaling

Tensors = dict[str, Tensor]

INDEX = "index"
"""Name of the array that says which tensors the others hold."""
SEALED = "sealed"
"""Name of the array of bytes that are sealed to somebody (`federation/wire/sealing.py`)."""
EXPONENTS = "mxint8_exponents"
"""Name of the array of the exponents of what travels as MXINT8."""
GROWTH: dict[WireDtype, float] = {
    "float32": 2.0**-20,
    "bfloat16": 2.0**-8,
    "mxint8": microscaling.GROWTH,
}
"""Rounding to a wire type lengthens a vector by less than this share of its L2 norm."""
_NUMPY = {
    "float32": "<f4", "bfloat16": "<u2", "mxint8": "|i1", EXPONENTS: "|u1", "float64": "<f8", "uint32": "<u4",
    "bytes": "|u1",
}  # fmt: skip
_KINDS = {"float32", "bfloat16", "mxint8", "float64", "uint32"}
_FORMAT = "numpy.ndarray"
_LARGEST = 1 << 40  # a size beyond it is a lie
_MOST_DIMENSIONS = 8  # torch itself ends at 64
_LARGEST_INDEX = 1 << 20  # bytes: JSON of other lists would grow to many times as much
_HEADER_BYTES = 256  # more than numpy's
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    r"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \((\d{1,13}),\), \} *\n", re.ASCII
)


class RefusalKind(StrEnum):
    """Why a site does not answer. Closed: an exception's own words never leave the site.

    The last four stay in the site's books: a centre could bring them about by its choice of weights, and
    learn from which one came. What leaves instead is `not_answered` (`client/books/refusals.py`).
    """

    BUNDLE_NOT_APPROVED = "bundle_not_approved"
    PLAN_NOT_ACCEPTED = "plan_not_accepted"
    OUTSIDE_HOURS = "outside_hours"
    PATIENTS_NOT_CONFIRMED = "patients_not_confirmed"
    WRONG_VERSION = "wrong_version"
    MALFORMED = "malformed"
    WRONG_TOKENIZER = "wrong_tokenizer"
    COHORT_TOO_SMALL = "cohort_too_small"
    NO_SCANS = "no_scans"
    NO_LABELS = "no_labels"
    OUT_OF_ORDER = "out_of_order"
    STORAGE = "storage"
    BUDGET = "budget"
    ANSWERED_BEFORE = "answered_before"
    TOO_FEW_FOR_SUMS = "too_few_for_sums"
    NO_KEYS = "no_keys"
    SUM_REFUSED = "sum_refused"
    NOT_ANSWERED = "not_answered"
    STOPPED = "stopped"
    NON_FINITE = "non_finite"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    INTERNAL = "internal"


class MessageError(ValueError):
    """A record that is not the message it should be; `kind` is what a site answers."""

    def __init__(self, text: str, kind: RefusalKind = RefusalKind.MALFORMED) -> None:
        super().__init__(text)
        self.kind = kind


def record_to_bytes(record: RecordDict) -> bytes:
    """A message's record as bytes, to be kept in a file."""
    content: bytes = recorddict_to_proto(record).SerializeToString()
    return content


def record_of_bytes(content: bytes) -> RecordDict:
    """The record that was written so; for bytes of this site's own."""
    return recorddict_from_proto(RecordDictProto.FromString(content))


def array_record(
    tensors: Mapping[str, Tensor], wire_dtype: WireDtype = "float32", masked: bool = False
) -> ArrayRecord:
    """Named tensors as few Flower arrays: the values of one type in a row, and an index of names and shapes.

    float32 travels as `wire_dtype` says (`travels_as`); float64 as it is. `masked`: all are uint32, masked
    for a secure sum. Raises `MessageError` for any other dtype: a count or a flag is not a sum that may be
    averaged.
    """
    rows = dict[str, list[Tensor]]()
    for name, tensor in tensors.items():
        if tensor.dtype not in ((torch.uint32,) if masked else (torch.float32, torch.float64)):
            proper = "uint32" if masked else "float32 or float64"
            raise MessageError(f"Expected {name!r} to be {proper}; got {tensor.dtype}.")
        rows.setdefault(travels_as(tensor, wire_dtype), []).append(tensor)
    if not tensors:
        return ArrayRecord()
    arrays = {INDEX: Array(np.frombuffer(_index_text(tensors, wire_dtype), dtype=np.uint8))}
    if coded := [microscaling.encode(tensor) for tensor in rows.pop("mxint8", [])]:
        rows |= {"mxint8": [values for values, _ in coded], EXPONENTS: [codes for _, codes in coded]}
    for kind, row in rows.items():
        arrays[kind] = _array(kind, row)
    return ArrayRecord(arrays)


def travels_as(tensor: Tensor, wire_dtype: WireDtype) -> str:
    """The type in which a float32 or float64 tensor travels: float64 as it is (as uint32, of a secure sum);
    as `mxint8` matrices and more, while vectors (biases, gains: few, and unlike each other in size) stay
    float32."""
    if tensor.dtype == torch.uint32:
        return "uint32"
    return "float64" if tensor.dtype == torch.float64 else _float32_as(tensor.ndim, wire_dtype)


def _float32_as(dimensions: int, wire_dtype: WireDtype) -> WireDtype:
    return "float32" if wire_dtype == "mxint8" and dimensions < 2 else wire_dtype


def rounded(tensor: Tensor, wire_dtype: WireDtype) -> Tensor:
    """The values that arrive when this tensor is sent; not a copy where they are these values."""
    match travels_as(tensor, wire_dtype):
        case "bfloat16":
            return tensor.to(torch.bfloat16).float()
        case "mxint8":
            return microscaling.decode(*microscaling.encode(tensor)).view(tensor.shape)
        case _:
            return tensor


def num_bytes(tensors: Mapping[str, Tensor], wire_dtype: WireDtype) -> int:
    """Bytes of the values of these tensors on the wire, without index and headers."""
    return sum(
        size * np.dtype(_NUMPY[row]).itemsize
        for tensor in tensors.values()
        for row, size in _parts(travels_as(tensor, wire_dtype), tensor.shape)
    )


def bytes_record(content: bytes) -> ArrayRecord:
    """Bytes that nobody on the way reads, as one array."""
    tensor = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )
    return ArrayRecord({SEALED: _array("bytes", [tensor])})


def bytes_of(record: ArrayRecord) -> bytes:
    """The inverse of `bytes_record`. Raises `MessageError`."""
    if set(record) != {SEALED}:
        raise MessageError(f"Expected one array {SEALED!r}; got another record.")
    content: bytes = _values(record[SEALED], SEALED, _NUMPY["bytes"]).tobytes()
    return content


def arrays_bytes(record: RecordDict) -> int:
    """Bytes of all arrays of a message."""
    return sum(part.count_bytes() for part in record.array_records.values())


def record_bytes(tensors: Mapping[str, Tensor], wire_dtype: WireDtype) -> int:
    """Bytes of the arrays that `array_record` makes of tensors of these names, shapes and dtypes, at most."""
    headers = (len(_NUMPY) + 1) * _HEADER_BYTES
    return num_bytes(tensors, wire_dtype) + len(_index_text(tensors, wire_dtype)) + headers


def _index_text(tensors: Mapping[str, Tensor], wire_dtype: WireDtype) -> bytes:
    index = [[name, travels_as(tensor, wire_dtype), list(tensor.shape)] for name, tensor in tensors.items()]
    return json.dumps(index, separators=(",", ":")).encode()


def tensors_of(
    record: ArrayRecord, wire_dtype: WireDtype = "float32", copy: bool = True, masked: bool = False
) -> Tensors:
    """Flower arrays as named tensors; the inverse of `array_record`. Raises `MessageError`.

    Without `copy`, float32 and uint32 tensors are views of the received bytes: nothing is allocated, nothing
    may write.
    """
    if not record:
        return {}
    index = _index(record)
    sizes = dict[str, int]()
    for name, kind, shape in index:
        proper = ("uint32",) if masked else (_float32_as(len(shape), wire_dtype), "float64")
        if kind not in proper:
            raise MessageError(f"Expected {name[:40]!r} as {' or '.join(proper)}; got {kind}.")
        for row, size in _parts(kind, shape):
            sizes[row] = sizes.get(row, 0) + size
    wanted = {INDEX, *sizes}
    if unwanted := sorted(set(record) ^ wanted):
        raise MessageError(f"Expected arrays {', '.join(sorted(wanted))}; {unwanted[0][:40]!r} is not so.")
    rows = {row: _values(record[row], row, _NUMPY[row]) for row in sizes}
    for row, size in sizes.items():
        if size != len(rows[row]):
            raise MessageError(f"Expected {size} values as {row}; the array holds {len(rows[row])}.")
    tensors, taken = Tensors(), dict.fromkeys(rows, 0)
    for name, kind, shape in index:
        parts = []
        for row, size in _parts(kind, shape):
            parts.append(rows[row][taken[row] : taken[row] + size])
            taken[row] += size
        tensors[name] = _tensor(kind, parts, copy).view(shape)
    return tensors


def _parts(kind: str, shape: Sequence[int]) -> list[tuple[str, int]]:
    """The arrays that hold a tensor, and how many of their values are its own."""
    size = math.prod(shape)
    if kind == "mxint8":
        return [(kind, size), (EXPONENTS, microscaling.num_blocks(size))]
    return [(kind, size)]


def _array(kind: str, tensors: Sequence[Tensor]) -> Array:
    """Values one after the other, in numpy's format, written once."""
    size = sum(tensor.numel() for tensor in tensors)
    stream = io.BytesIO()
    header = {"descr": _NUMPY[kind], "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, header)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        if kind == "bfloat16":
            plain = plain.to(torch.bfloat16).view(torch.uint16)
        stream.write(plain.reshape(-1).numpy().data)
    return Array(np.dtype(_NUMPY[kind]).name, (size,), _FORMAT, stream.getvalue())


def _index(record: ArrayRecord) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, kind and shape of each tensor, in the order of their values."""
    if INDEX not in record:
        raise MessageError("Expected an array 'index' of names and shapes; got none.")
    text = _values(record[INDEX], INDEX, "|u1")
    if len(text) > _LARGEST_INDEX:
        raise MessageError(f"Expected an index of at most {_LARGEST_INDEX} bytes; got {len(text)}.")
    try:
        entries = json.loads(text.tobytes())
    except (ValueError, RecursionError) as error:
        raise MessageError("Expected an index in JSON; got something else.") from error
    index, names = [], set[str]()
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case [str(name), str(kind), [*shape]] if kind in _KINDS and _is_shape(shape):
                index.append((name, kind, tuple(shape)))
                names.add(name)
            case _:
                raise MessageError("Expected an index of [name, kind, shape]; got something else.")
    if len(names) < len(index):
        raise MessageError("Expected each tensor once in the index; one is there twice.")
    return index


def _is_shape(shape: Sequence[object]) -> bool:
    """Whether a tensor may have this shape."""
    if len(shape) > _MOST_DIMENSIONS:
        return False
    sizes = [size for size in shape if type(size) is int and 0 <= size <= _LARGEST]
    return len(sizes) == len(shape) and math.prod(size or 1 for size in sizes) <= _LARGEST


def _values(array: Array, name: str, descr: str) -> NDArray[Any]:
    """The values of an array in numpy's format that must be of one type and in a row."""
    if array.stype != _FORMAT:
        raise MessageError(f"Expected array {name!r} in numpy's format; got {array.stype[:40]!r}.")
    # Not numpy's own reader, which evaluates a header as Python and warns about what it mends.
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(array.data[len(_MAGIC) : start], "little")
    header = _HEADER.fullmatch(array.data[start:end].decode("latin-1"))
    if not array.data.startswith(_MAGIC) or header is None:
        raise MessageError(f"Expected array {name!r} in numpy's format, a row; got another header.")
    kind, size = header[1], int(header[2])
    if kind != descr:
        raise MessageError(f"Expected array {name!r} to be a row of {descr}; got one of {kind}.")
    dtype = np.dtype(descr)
    if tuple(array.shape) != (size,) or len(array.data) - end != size * dtype.itemsize:
        raise MessageError(f"Expected {size} values in array {name!r}; its bytes are not as many.")
    return np.frombuffer(array.data, dtype=dtype, offset=end)


def _tensor(kind: str, parts: Sequence[NDArray[Any]], copy: bool) -> Tensor:
    """Values of one tensor in a row, from its parts of the arrays."""
    match kind:
        case "mxint8":
            values, exponents = map(from_dlpack, parts)
            return microscaling.decode(values, exponents)
        case "bfloat16":
            return from_dlpack(parts[0]).view(torch.bfloat16).float()
        case _:
            return torch.from_numpy(parts[0].copy()) if copy else from_dlpack(parts[0])
