"""Adding up what sites send: each reply is validated alone, folded into one sum and dropped.

The sum is exact. Values become integers on a grid of 2^-q (q from the declared bounds, so that no overflow is
possible), and integers add in any order, in any grouping and on any number of threads to the same bits. A
block of the sum is kept in int32 as long as what was folded cannot overflow it, then in int64: which of the
two has no influence on the sum. Memory: four bytes per value of the model, however many sites reply.
A reply that turns out to be far longer than the round's others is taken out again, exactly (`screen`).
Robust rules, which need all replies at once, are in `strategies/robust.py`.
What this file does not do: it knows no message, no round and no Flower.

Source: reproducible summation in fixed point, as in the long accumulators of Kulisch (1981).
Flower's FedAvg for comparison: bench/aggregation.py.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.files import private_folder

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Result = TypeVar("Result")

_BLOCK = 1 << 17  # values per pass: the block and its scratch stay in a core's cache
_FINEST_GRID_BITS = 26  # 1.5e-8 of a weighted sum: below float32 for weights of 0.1, and int32 reaches 32
_COARSEST_GRID_BITS = 20
_INT32_REACH = 2.0**31 - 1
_LARGEST = 2.0**62
_FEWEST_TO_SCREEN = 3  # of two replies nobody can say which one is the odd one
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
        """q of the grid 2^-q; raises `ValueError` when the bounds leave too coarse a grid."""
        largest = self.num_replies * self.max_examples * self.max_norm * _ROUNDING
        bits = math.floor(62 - math.log2(largest))
        if bits < _COARSEST_GRID_BITS:
            raise ValueError(
                f"Expected bounds that leave {_COARSEST_GRID_BITS} bits after the point; {self} leave {bits}."
                " Lower release.update_clip_norm."
            )
        return min(bits, _FINEST_GRID_BITS)


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

    def norm(self, values: list[Floats], squares: float, examples: int) -> float:
        """L2 norm of the mean update; refuses NaN, infinity, and more than `max_norm`."""
        limit = examples * self.bounds.max_norm * _ROUNDING
        if not math.isfinite(squares) and not all(np.isfinite(v).all() for v in values):
            raise ReplyRefused("Expected finite values; got NaN or infinity.")
        if not squares <= limit**2:
            raise ReplyRefused(
                f"Expected an update of L2 norm at most {self.bounds.max_norm:g} per example; got "
                f"{math.sqrt(squares) / examples:g}."
            )
        return math.sqrt(squares) / examples

    def unflat(self, values: Floats) -> dict[str, Tensor]:
        """One flat array as the tensors of the reference, sharing its memory."""
        tensors, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            tensors[name] = torch.from_numpy(values[start:stop].reshape(shape))
            start = stop
        return tensors


def outliers(norms: Mapping[str, float], tolerance: float) -> dict[str, str]:
    """Sites whose mean update is longer than `tolerance` times the (lower) median of the round's, and why.

    Nobody with fewer than three replies, when the median is 0, or when `tolerance` is 0.
    """
    ordered = sorted(norms.values())
    median = ordered[(len(ordered) - 1) // 2] if len(ordered) >= _FEWEST_TO_SCREEN else 0.0
    limit = tolerance * median
    return {
        site: f"Expected an update of L2 norm at most {tolerance:g} times the round's median, {median:.3g}; "
        f"got {norm:.3g}."
        for site, norm in norms.items()
        if 0.0 < limit < norm
    }


class _BlockSum:
    """The sum of one block: whole numbers in int32 or, when that may overflow, in int64."""

    __slots__ = ("_narrow", "_reach", "integers")

    def __init__(self, memory: NDArray[np.int32]) -> None:
        self._narrow = memory
        self.integers: NDArray[np.int32] | Integers = memory  # written by the first addition
        self._reach = 0.0  # no value of the sum is larger

    def add(self, rounded: Floats, scratch: Integers, length: float = math.inf, sign: int = 1) -> bool:
        """Add (or take away) whole numbers; False, and nothing done, if int64 does not hold them.

        `length` is their L2 norm, if known: no number is larger. `scratch` is a block's worth of memory.
        """
        first = self._reach == 0.0
        largest = 1.0 + length * _ROUNDING
        if not self._reach + largest <= _INT32_REACH:  # NaN, too
            largest = max(float(np.maximum.reduce(rounded)), -float(np.minimum.reduce(rounded)), 1.0)
            if not largest < _LARGEST:
                return False
        self._reach += largest
        if self.integers.dtype == np.int32 and self._reach > _INT32_REACH:
            self.integers = self._narrow.astype(np.int64)
        if first:
            np.copyto(self.integers, rounded, casting="unsafe")
            return True
        whole = scratch.view(self.integers.dtype)[: len(rounded)]
        np.copyto(whole, rounded, casting="unsafe")
        if sign > 0:
            self.integers += whole
        else:
            self.integers -= whole
        return True


_Piece = tuple[_BlockSum, Floats]


@dataclass(frozen=True)
class _Kept:
    """A folded reply that may be taken out again."""

    path: Path
    examples: int
    norm: float


class StreamingSum:
    """Weighted mean over sites: sum of (examples · update) over sum of examples, exactly and in any order.

    `spill` is a folder of this sum's own in which replies wait on disk until the round is screened; without
    it, or with fewer than three replies in all, nothing is kept and `screen` finds nobody.
    """

    def __init__(
        self, reference: Mapping[str, Tensor], bounds: Bounds, threads: int = 1, spill: Path | None = None
    ) -> None:
        self.validation = Validation(reference, bounds)
        self.examples = 0
        self.num_replies = 0
        self._threads = threads
        self._spill = spill if bounds.num_replies >= _FEWEST_TO_SCREEN else None
        self._kept: dict[str, _Kept] = {}
        self._scale = np.float32(2.0**bounds.grid_bits)
        self._memory: list[NDArray[np.int32]] = []
        self.reset()

    def fold(self, site: str, update: Mapping[str, Tensor], examples: int) -> None:
        """Validate one reply and add it; whatever is raised, the sum is as before. `site` does not matter."""
        assert self.num_replies < self.validation.bounds.num_replies, "more replies than were declared"
        values = self.validation.flat(update, examples)
        if self.num_replies == 0:
            self._begin()
        added: list[_Piece] = []
        try:
            squares = math.fsum(self._each(lambda pieces: self._add(pieces, added), values))
            norm = self.validation.norm(values, squares, examples)
            if self._spill is not None:
                self._kept[site] = self._keep(self._spill, values, examples, norm)
        except BaseException:
            if self.num_replies:  # else the next reply begins anew
                self._subtract(added)  # integers: what was added leaves no trace
            raise
        self.examples += examples
        self.num_replies += 1

    def _keep(self, folder: Path, values: list[Floats], examples: int, norm: float) -> _Kept:
        private_folder(folder)
        path = folder / f"{self.num_replies}.float32"
        with path.open("wb") as file:
            for value in values:
                file.write(value.data)
        return _Kept(path, examples, norm)

    def screen(self, tolerance: float) -> dict[str, str]:
        """Take out who is an outlier among the replies so far (`outliers`); sites and reasons."""
        found = outliers({site: kept.norm for site, kept in self._kept.items()}, tolerance)
        for site in found:
            kept = self._kept.pop(site)
            self._each(self._subtract, list(self._read(kept.path)))
            self.examples -= kept.examples
            self.num_replies -= 1
        return found

    def mean(self) -> dict[str, Tensor]:
        """Sum over examples; raises `ReplyRefused` when nothing was folded.

        The means take over the memory of the sum, and a new sum begins.
        """
        if not self.examples:
            raise ReplyRefused("Expected at least one valid reply; got none.")
        self._each(self._divide, [memory.view(np.float32) for memory in self._memory])
        means = {
            name: torch.from_numpy(memory.view(np.float32).reshape(shape))
            for (name, shape), memory in zip(self.validation.shapes.items(), self._memory, strict=True)
        }
        self._memory = []
        self.reset()
        return means

    def reset(self) -> None:
        """Begin a new sum."""
        self.examples = self.num_replies = 0
        self._sum: list[_BlockSum] = []
        self._kept = {}
        if self._spill is not None:
            shutil.rmtree(self._spill, ignore_errors=True)  # what this round, or an interrupted one, left

    def _read(self, path: Path) -> Iterator[Floats]:
        start = 0
        for shape in self.validation.shapes.values():
            size = math.prod(shape)
            yield np.fromfile(path, dtype=np.float32, count=size, offset=4 * start)
            start += size

    def _begin(self) -> None:
        if not self._memory:
            sizes = [math.prod(shape) for shape in self.validation.shapes.values()]
            self._memory = [np.empty(size, dtype=np.int32) for size in sizes]
        self._sum = [
            _BlockSum(memory[i : i + _BLOCK])
            for memory in self._memory
            for i in range(0, len(memory), _BLOCK)
        ]

    def _each(self, work: Callable[[list[_Piece]], Result], tensors: list[Floats]) -> list[Result]:
        """Do `work` on all tensors in pieces of a block, divided among the threads."""
        cut = (tensor[i : i + _BLOCK] for tensor in tensors for i in range(0, len(tensor), _BLOCK))
        pieces = list(zip(self._sum, cut, strict=True))
        if self._threads == 1:
            return [work(pieces)]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(work, (pieces[i :: self._threads] for i in range(self._threads))))

    def _add(self, pieces: list[_Piece], added: list[_Piece]) -> float:
        """Add a reply's pieces while measuring them; their sum of squares, not finite if one was left out.

        What was added is noted in `added`, so that it can be taken out again wherever the work ends.
        """
        rounded, scratch = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.int64)
        squares = []
        for total, values in pieces:
            block = rounded[: len(values)]
            self._round(values, block)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
                squares.append(float(np.dot(block, block)))
            if not total.add(block, scratch, math.sqrt(squares[-1])):
                return math.inf
            added.append((total, values))
        return math.fsum(squares) / float(self._scale) ** 2

    def _subtract(self, pieces: list[_Piece]) -> None:
        rounded, scratch = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.int64)
        for total, values in pieces:
            self._round(values, rounded[: len(values)])
            taken = total.add(rounded[: len(values)], scratch, sign=-1)
            assert taken, "what was added can be taken away"

    def _round(self, values: Floats, rounded: Floats) -> None:
        with np.errstate(over="ignore"):  # what becomes infinite is not added
            np.multiply(values, self._scale, out=rounded)  # exact: a power of two
        np.rint(rounded, out=rounded)

    def _divide(self, pieces: list[_Piece]) -> None:
        unit = 1.0 / (float(self._scale) * self.examples)
        scratch = np.empty(_BLOCK)
        for total, means in pieces:
            scaled = scratch[: len(means)]
            np.copyto(scaled, total.integers)
            scaled *= unit
            means[:] = scaled  # in the place of the integers


def _flat(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().cpu().contiguous().numpy().reshape(-1)
    return values
