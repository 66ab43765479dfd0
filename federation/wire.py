"""Tensors on the wire: named tensors as Flower arrays and back, and what can be wrong with a message.

float32 and float64 travel as they are, bfloat16 as uint16 bits (numpy has no bfloat16); integers and booleans
never travel. What this file does not do: it knows no message (`federation/messages.py`).
"""

import io
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Tensors = dict[str, Tensor]
WireDtype = Literal["float32", "bfloat16"]


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
    """Named tensors as Flower arrays: float32 (or bfloat16 bits, if `wire_dtype` says so) and float64.

    Raises `MessageError` for any other dtype: a count or a flag is not a sum that may be averaged.
    """
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise MessageError(f"Expected {name!r} to be float32 or float64; got {tensor.dtype}.")
        plain = tensor.detach().cpu().contiguous()
        if wire_dtype == "bfloat16" and plain.dtype == torch.float32:
            arrays[name] = Array(plain.to(torch.bfloat16).view(torch.uint16).numpy())
        else:
            arrays[name] = Array(plain.numpy())
    return ArrayRecord(arrays)


def tensors_of(record: ArrayRecord, wire_dtype: WireDtype = "float32", copy: bool = True) -> Tensors:
    """Flower arrays as named tensors; the inverse of `array_record`. Raises `MessageError`.

    Without `copy`, float32 tensors are views of the received bytes: nothing is allocated, nothing may write.
    """
    return {name: _tensor(name, array, wire_dtype, copy) for name, array in record.items()}


def _tensor(name: str, array: Array, wire_dtype: WireDtype, copy: bool) -> Tensor:
    if array.stype != "numpy.ndarray":
        raise MessageError(f"Expected array {name!r} in numpy's format; got {array.stype!r}.")
    allowed = {"float32": ("<f4", "<f8"), "bfloat16": ("<u2", "<f8")}[wire_dtype]
    stream = io.BytesIO(array.data)
    try:
        major, _ = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise MessageError(f"Expected array {name!r} in numpy's format; got a broken header.") from error
    if dtype.str not in allowed or fortran:
        raise MessageError(f"Expected array {name!r} to be {' or '.join(allowed)}; got {dtype.str}.")
    if tuple(array.shape) != shape or len(array.data) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise MessageError(f"Expected array {name!r} of shape {tuple(array.shape)}; its bytes are another.")
    values = np.frombuffer(array.data, dtype=dtype, offset=stream.tell()).reshape(shape)
    if dtype.str == "<u2":
        return from_dlpack(values).view(torch.bfloat16).float()
    return torch.from_numpy(values.copy()) if copy else from_dlpack(values)
