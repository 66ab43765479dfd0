"""The largest values: what a reply may hold at most, from the plan where it depends on it.

A centre reads what comes from elsewhere. So every count, every metric and the size of every reply has a
largest value that is known before the reply is asked for; beyond it the reply is put aside unread. The values
are far beyond what an honest site has. What this file does not do: it reads and pulls nothing
(`strategies/reply_pull.py`, `federation/wire/wire.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.plan.plan import WireDtype
from federation.wire.wire import Tensors, record_bytes

MOST_SCANS = 1 << 20
"""Scans of a site, at most: those behind an update, those surveyed, and those whose latents it releases."""
MOST_PATIENTS = 1 << 20
"""Patients of a site, at most."""
LARGEST_LOSS = 1e9
"""A loss is at most this large, of either sign; training has failed long before."""

_LARGEST_METRIC: Mapping[str, tuple[float, float]] = {
    "seconds": (0.0, 1e7),  # a third of a year
    "steps": (0.0, 1e7),
    "grad_norm": (0.0, 1e12),
    "update_norm": (0.0, 1e12),
    "clip_factor": (0.0, 1.0),
    "learning_rate": (0.0, 1e3),
    "teacher_momentum": (0.0, 1.0),
}
_HEAD_BYTES = 1 << 16
_SMALLEST_CHUNK = 1 << 20
_FEW_OBJECTS = 64


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The size of the largest reply to a question. More than this is neither pulled nor inflated."""

    array_bytes: int
    """Bytes of all arrays together, headers and index included."""
    head_bytes: int = _HEAD_BYTES
    """Bytes of everything else: scalars, names, what holds the parts together."""

    @property
    def num_objects(self) -> int:
        """Flower objects (records, arrays, chunks of them) that make up the reply."""
        return _FEW_OBJECTS + self.array_bytes // _SMALLEST_CHUNK


def largest_reply(
    tensors: Mapping[str, Tensor], wire_dtype: WireDtype = "float32", text_bytes: int = 0
) -> Largest:
    """The size of a reply that holds tensors of these names, shapes and dtypes (values are not looked at) and
    up to `text_bytes` of text beside its usual scalars."""
    return Largest(array_bytes=record_bytes(tensors, wire_dtype), head_bytes=_HEAD_BYTES + text_bytes)


def promised(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> Tensors:
    """Tensors of these shapes without values, for `largest_reply`."""
    return {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}


def metric_range(name: str) -> tuple[float, float]:
    """Least and largest value of a metric that a site tells of its round."""
    return _LARGEST_METRIC.get(name, (-LARGEST_LOSS, LARGEST_LOSS))
