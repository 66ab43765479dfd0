"""Adding up what sites send: each reply is validated alone, folded into one sum and dropped.

The sum is exact. Values become integers on a grid fine enough for float32 (2^-q, q from the declared bounds,
so that no overflow is possible) and are added in int64; integers add in any order, in any grouping and on any
number of threads to the same bits. Memory: one int64 per value of the model, however many sites reply. Robust
rules, which need all replies at once, are in `strategies/robust.py`. What this file does not do: it knows no
message, no round and no Flower.

Source: reproducible summation by fixed-point accumulation, as in the long accumulators of Kulisch (1981).
Flower 1.41 for comparison: bench/aggregation.py.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Result = TypeVar("Result")

_BLOCK = 1 << 16  # values per pass: the block and its scratch stay in a core's cache
_SMALLEST_GRID_BITS = 20
_ROUNDING = 1 + 2**-10  # a norm computed in float32 at the site and again here


class ReplyRefused(ValueError):
    """A reply that is not folded; the message says what was expected and what came."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What was declared before any reply came; from it follows a grid on which no sum can overflow."""

    num_replies: int
    """Most replies that will be folded."""
    max_norm: float
    """L2 norm of a site's mean update, at most (`release.update_clip_norm`)."""
    max_examples: int = 1 << 20
    """Weight of a reply, at most."""

    @property
    def grid_bits(self) -> int:
        """q of the grid 2^-q; raises `ValueError` when the bounds leave a grid too coarse for float32."""
        largest = self.num_replies * self.max_examples * self.max_norm * _ROUNDING
        bits = math.floor(62 - math.log2(largest))
        if bits < _SMALLEST_GRID_BITS:
            raise ValueError(
                f"Expected bounds that leave {_SMALLEST_GRID_BITS} bits after the point; {self} leave {bits}."
                " Lower release.update_clip_norm."
            )
        return min(bits, 100)


class Fold(Protocol):
    """A rule that takes replies one by one and ends in a mean update."""

    def fold(self, site: str, update: Mapping[str, Tensor], examples: int) -> None:
        """Validate and take in one reply, `update` = examples · mean update; raises `ReplyRefused`."""

    def mean(self) -> dict[str, Tensor]:
        """The aggregate of what was folded, as float32 tensors of the reference's shapes."""


class Validation:
    """Checks a reply alone against the reference: names, shapes, dtype, finite, weight and norm in range.

    Nothing is ever broadcast, dropped or filled in.
    """

    def __init__(self, reference: Mapping[str, Tensor], bounds: Bounds) -> None:
        self.bounds = bounds
        self.shapes = {name: tuple(tensor.shape) for name, tensor in reference.items()}
        self.num_values = sum(math.prod(shape) for shape in self.shapes.values())

    def flat(self, update: Mapping[str, Tensor], examples: int) -> list[Floats]:
        """The values of `update` in the reference's order, as flat views; raises `ReplyRefused`."""
        if isinstance(examples, bool) or not isinstance(examples, int):
            raise ReplyRefused(f"Expected a whole number of examples; got {examples!r}.")
        if not 0 < examples <= self.bounds.max_examples:
            raise ReplyRefused(f"Expected between 1 and {self.bounds.max_examples} examples; got {examples}.")
        if missing := sorted(set(self.shapes) - set(update)):
            raise ReplyRefused(f"Expected tensor {missing[0]!r}; it is missing ({len(missing)} in all).")
        if extra := sorted(set(update) - set(self.shapes)):
            raise ReplyRefused(f"Expected no tensor {extra[0][:60]!r}; plan and site disagree.")
        for name, shape in self.shapes.items():
            if tuple(update[name].shape) != shape:
                raise ReplyRefused(f"Expected {name!r} of shape {shape}; got {tuple(update[name].shape)}.")
            if update[name].dtype != torch.float32:
                raise ReplyRefused(f"Expected {name!r} to be float32; got {update[name].dtype}.")
        return [_flat(update[name]) for name in self.shapes]

    def check_norm(self, values: list[Floats], squares: float, examples: int) -> None:
        """Refuse NaN, infinity, and an update longer than `examples * max_norm`."""
        limit = examples * self.bounds.max_norm * _ROUNDING
        if not math.isfinite(squares) and not all(np.isfinite(v).all() for v in values):
            raise ReplyRefused("Expected finite values; got NaN or infinity.")
        if not squares <= limit**2:
            raise ReplyRefused(
                f"Expected an update of L2 norm at most {self.bounds.max_norm:g} per example; got "
                f"{math.sqrt(squares) / examples:g}."
            )

    def unflat(self, values: Floats) -> dict[str, Tensor]:
        """One flat array as the tensors of the reference, sharing its memory."""
        tensors, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            tensors[name] = torch.from_numpy(values[start:stop].reshape(shape))
            start = stop
        return tensors


class StreamingSum:
    """Weighted mean over sites: sum of (examples · update) over sum of examples, exactly and in any order."""

    def __init__(self, reference: Mapping[str, Tensor], bounds: Bounds, threads: int = 1) -> None:
        self.validation = Validation(reference, bounds)
        self.examples = 0
        self.num_replies = 0
        self._threads = threads
        self._scale = np.float32(2.0**bounds.grid_bits)
        sizes = [math.prod(shape) for shape in self.validation.shapes.values()]
        self._sums: list[Integers] = [
            np.empty(size, dtype=np.int64) for size in sizes
        ]  # the first reply fills

    def fold(self, site: str, update: Mapping[str, Tensor], examples: int) -> None:
        """Validate one reply and add it; on `ReplyRefused` the sum is as before. `site` has no influence."""
        assert self.num_replies < self.validation.bounds.num_replies, "more replies than were declared"
        values = self.validation.flat(update, examples)
        squares = math.fsum(self._each(_squares, values))
        self.validation.check_norm(values, squares, examples)
        work = self._set if self.num_replies == 0 else self._add
        self._each(work, values)
        self.examples += examples
        self.num_replies += 1

    def mean(self) -> dict[str, Tensor]:
        """Sum over examples; raises `ReplyRefused` when nothing was folded."""
        if not self.examples:
            raise ReplyRefused("Expected at least one valid reply; got none.")
        means = {name: torch.empty(shape) for name, shape in self.validation.shapes.items()}
        self._each(self._divide, [_flat(tensor) for tensor in means.values()])
        return means

    def reset(self) -> None:
        """Begin a new sum in the memory of the old one."""
        self.examples = self.num_replies = 0

    def _each(self, work: Callable[[list["_Block"]], Result], tensors: list[Floats]) -> list[Result]:
        """Do `work` on all blocks of `tensors`, divided among the threads."""
        blocks = [
            _Block(tensor, index, slice(start, start + _BLOCK))
            for index, tensor in enumerate(tensors)
            for start in range(0, len(tensor), _BLOCK)
        ]
        if self._threads == 1:
            return [work(blocks)]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(work, (blocks[i :: self._threads] for i in range(self._threads))))

    def _set(self, blocks: list["_Block"]) -> None:
        scratch = np.empty(_BLOCK, dtype=np.float32)
        for block in blocks:
            np.copyto(self._sums[block.tensor][block.place], self._round(block, scratch), casting="unsafe")

    def _add(self, blocks: list["_Block"]) -> None:
        scratch, whole = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.int64)
        for block in blocks:
            rounded = self._round(block, scratch)
            integers = whole[: len(rounded)]
            np.copyto(integers, rounded, casting="unsafe")
            self._sums[block.tensor][block.place] += integers

    def _round(self, block: "_Block", scratch: Floats) -> Floats:
        rounded = scratch[: len(block.values)]
        np.multiply(block.values, self._scale, out=rounded)  # exact: a power of two
        np.rint(rounded, out=rounded)
        return rounded

    def _divide(self, blocks: list["_Block"]) -> None:
        unit = 1.0 / (float(self._scale) * self.examples)
        scratch = np.empty(_BLOCK)
        for block in blocks:
            scaled = scratch[: len(block.values)]
            np.multiply(self._sums[block.tensor][block.place], unit, out=scaled)
            block.values[:] = scaled


class _Block:
    """A piece of a tensor that fits in a core's cache, and its place in that tensor."""

    __slots__ = ("place", "tensor", "values")

    def __init__(self, values: Floats, tensor: int, place: slice) -> None:
        self.values, self.tensor, self.place = values[place], tensor, place


def _squares(blocks: list[_Block]) -> float:
    return math.fsum(float(np.dot(block.values, block.values)) for block in blocks)


def _flat(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().cpu().contiguous().numpy().reshape(-1)
    return values
