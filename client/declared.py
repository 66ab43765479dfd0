"""What may stand in a release: exactly the declared tensors, agreed counts and metrics, opaque names.

What is asked before anything is bounded (`client/release.py`); whatever fails refuses the whole release.
Does not do: bound, add noise, or let out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from federation.exchanges.latents import is_item
from federation.wire.messages import METRIC_NAMES
from federation.wire.wire import RefusalKind

COUNT_NAMES: Final = frozenset({"examples", "num_patients", "num_scans", "first_item", "num_items"})
"""Every whole number that may leave a site."""


class GateRefusal(ValueError):
    """The gate stays shut; `kind` is what the centre is told."""

    def __init__(self, text: str, kind: RefusalKind = RefusalKind.INTERNAL) -> None:
        super().__init__(text)
        self.kind = kind


def check_declared(tensors: Mapping[str, Tensor], declared: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless exactly the declared tensors are there, each of its shape and of real numbers."""
    if undeclared := sorted(set(tensors) - set(declared)):
        raise GateRefusal(f"Expected declared tensors only; got {undeclared[0]!r}. Nothing is released.")
    if missing := sorted(set(declared) - set(tensors)):
        raise GateRefusal(f"Expected tensor {missing[0]!r}, which is declared; it is missing.")
    for name, shape in declared.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise GateRefusal(f"Expected {name!r} of shape {shape}; got {tuple(tensors[name].shape)}.")
        if tensors[name].dtype not in (torch.float32, torch.float64):
            raise GateRefusal(f"Expected {name!r} to be float32 or float64; got {tensors[name].dtype}.")


def check_items(items: Sequence[str], tensors: Mapping[str, Tensor], rows: float) -> None:
    """Opaque names only, as many as contributors leave by themselves, and a row of every tensor for each."""
    if len(set(items)) != rows or len(items) != rows or not all(map(is_item, items)):
        raise GateRefusal(f"Expected {rows:g} opaque names, each once; got {len(items)} names.")
    if items and any(len(tensor) != rows for tensor in tensors.values()):
        raise GateRefusal(f"Expected a row of every tensor for each of {rows:g} items.")


def checked_counts(counts: Mapping[str, object]) -> dict[str, int]:
    """Whole numbers of the agreed names, or a refusal."""
    checked: dict[str, int] = {}
    for name, count in counts.items():
        if name not in COUNT_NAMES:
            raise GateRefusal(f"Expected counts of the agreed names; got {name!r}.")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise GateRefusal(f"Expected count {name!r} to be a whole number >= 0; got {count!r}.")
        checked[name] = count
    return checked


def checked_metrics(metrics: Mapping[str, object]) -> dict[str, float]:
    """Finite numbers of the agreed names, or a refusal."""
    checked: dict[str, float] = {}
    for name, value in metrics.items():
        if name not in METRIC_NAMES:
            raise GateRefusal(f"Expected metrics of the agreed names; got {name!r}.")
        if not isinstance(value, float):
            raise GateRefusal(f"Expected metric {name!r} to be a float; got {type(value).__name__}.")
        if not math.isfinite(value):
            raise GateRefusal(f"Expected metric {name!r} to be finite; got {value}.", RefusalKind.NON_FINITE)
        checked[name] = float(value)  # np.float64 is a float, but Flower refuses it
    return checked
