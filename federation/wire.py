"""Tensors on the wire: named tensors as Flower arrays and back, and what can be wrong with a message.

float32 and float64 travel as they are, bfloat16 as uint16 bits (numpy has no bfloat16); integers and booleans
never travel. A model is a few arrays, not one per tensor: Flower asks for, sends and confirms each array and
each piece of one by itself, so 80 tensors were 164 requests. What this file does not do: it knows no message
(`federation/messages.py`).
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Tensors = dict[str, Tensor]
WireDtype = Literal["float32", "bfloat16"]

INDEX = "index"
"""Name of the array that says which tensors the others hold."""
_NUMPY = {"float32": "<f4", "bfloat16": "<u2", "float64": "<f8"}
_FORMAT = "numpy.ndarray"
_LARGEST = 1 << 40  # a size beyond it is a lie


class RefusalKind(StrEnum):
    """Why a site does not answer. Closed: an exception's own words never leave the site."""

    PLAN_NOT_ACCEPTED = "plan_not_accepted"
    OUTSIDE_HOURS = "outside_hours"
    WRONG_VERSION = "wrong_version"
    MALFORMED = "malformed"
    WRONG_TOKENIZER = "wrong_tokenizer"
    COHORT_TOO_SMALL = "cohort_too_small"
    NO_LABELS = "no_labels"
    OUT_OF_ORDER = "out_of_order"
    NON_FINITE = "non_finite"
    BUDGET = "budget"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    INTERNAL = "internal"


class MessageError(ValueError):
    """A record that is not the message it should be; `kind` is what a site answers."""

    def __init__(self, text: str, kind: RefusalKind = RefusalKind.MALFORMED) -> None:
        super().__init__(text)
        self.kind = kind


def array_record(tensors: Mapping[str, Tensor], wire_dtype: WireDtype = "float32") -> ArrayRecord:
    """Named tensors as few Flower arrays: the values of one type in a row, and an index of names and shapes.

    float32 travels as it is, or as bfloat16 bits if `wire_dtype` says so; float64 as it is. Raises
    `MessageError` for any other dtype: a count or a flag is not a sum that may be averaged.
    """
    index, rows = [], dict[str, list[Tensor]]()
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise MessageError(f"Expected {name!r} to be float32 or float64; got {tensor.dtype}.")
        kind: str = "float64" if tensor.dtype == torch.float64 else wire_dtype
        index.append([name, kind, list(tensor.shape)])
        rows.setdefault(kind, []).append(tensor)
    if not index:
        return ArrayRecord()
    text = json.dumps(index, separators=(",", ":")).encode()
    arrays = {INDEX: Array(np.frombuffer(text, dtype=np.uint8))}
    for kind, row in rows.items():
        arrays[kind] = _array(kind, row)
    return ArrayRecord(arrays)


def tensors_of(record: ArrayRecord, wire_dtype: WireDtype = "float32", copy: bool = True) -> Tensors:
    """Flower arrays as named tensors; the inverse of `array_record`. Raises `MessageError`.

    Without `copy`, float32 tensors are views of the received bytes: nothing is allocated, nothing may write.
    """
    if not record:
        return {}
    index = _index(record)
    wanted = {INDEX, *(kind for _, kind, _ in index)}
    if unwanted := sorted(set(record) ^ wanted):
        raise MessageError(f"Expected arrays {', '.join(sorted(wanted))}; {unwanted[0][:40]!r} is not so.")
    if wrong := sorted(wanted - {INDEX, wire_dtype, "float64"}):
        raise MessageError(f"Expected values as {wire_dtype} or float64; got {wrong[0]}.")
    rows = {kind: _values(record[kind], kind, _NUMPY[kind]) for kind in wanted - {INDEX}}
    tensors, taken = Tensors(), dict.fromkeys(rows, 0)
    for name, kind, shape in index:
        start, taken[kind] = taken[kind], taken[kind] + math.prod(shape)
        if taken[kind] > len(rows[kind]):
            break
        tensors[name] = _tensor(rows[kind][start : taken[kind]].reshape(shape), copy)
    if short := [kind for kind in rows if taken[kind] != len(rows[kind])]:
        raise MessageError(
            f"Expected {taken[short[0]]} values as {short[0]}; the array holds {len(rows[short[0]])}."
        )
    return tensors


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
    try:
        entries = json.loads(_values(record[INDEX], INDEX, "|u1").tobytes())
    except (ValueError, RecursionError) as error:
        raise MessageError("Expected an index in JSON; got something else.") from error
    index, names = [], set[str]()
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case [str(name), str(kind), [*shape]] if kind in _NUMPY and all(
                type(size) is int and 0 <= size <= _LARGEST for size in shape
            ):
                index.append((name, kind, tuple(shape)))
                names.add(name)
            case _:
                raise MessageError("Expected an index of [name, kind, shape]; got something else.")
    if len(names) < len(index):
        raise MessageError("Expected each tensor once in the index; one is there twice.")
    return index


def _values(array: Array, name: str, descr: str) -> NDArray[Any]:
    """The values of an array in numpy's format that must be of one type and in a row."""
    if array.stype != _FORMAT:
        raise MessageError(f"Expected array {name!r} in numpy's format; got {array.stype!r}.")
    stream = io.BytesIO(array.data)
    try:
        major, _ = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise MessageError(f"Expected array {name!r} in numpy's format; got a broken header.") from error
    if dtype.str != descr or len(shape) != 1:
        raise MessageError(f"Expected array {name!r} to be a row of {descr}; got {shape} of {dtype.str}.")
    if tuple(array.shape) != shape or len(array.data) - stream.tell() != shape[0] * dtype.itemsize:
        raise MessageError(f"Expected {shape[0]} values in array {name!r}; its bytes are not as many.")
    return np.frombuffer(array.data, dtype=dtype, offset=stream.tell())


def _tensor(values: NDArray[Any], copy: bool) -> Tensor:
    if values.dtype == np.uint16:
        return from_dlpack(values).view(torch.bfloat16).float()
    return torch.from_numpy(values.copy()) if copy else from_dlpack(values)
