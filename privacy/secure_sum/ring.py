"""The ring: whole numbers modulo 2^32, in which masks cancel and a sum that fits is exact.

A value becomes the nearest whole number on a grid of 2^-q. That no sum wraps: if n sites send vectors of L2
norm at most L each, no entry of a vector is larger than its norm, so after scaling an entry of the sum is at
most n · L · 2^q. `grid_bits` takes q such that this is below 2^31, where a number and its representative
modulo 2^32 from -2^31 to 2^31 - 1 are the same. Rounding is inside of L (`rounding_length`). What is
added to the vector in the ring, a mask, may be any number at all: addition modulo 2^32 is a group.

Does not do: bound anything; a site that sends a longer vector spoils the sum, and the bound of the sum shows
it with near certainty only where it spoils much.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.uint32]
"""Whole numbers modulo 2^32."""
Floats = NDArray[np.float32]

_BITS = 31
_BLOCK = 1 << 17  # values at once: what is computed on the way stays in a core's cache


def grid_bits(num_sites: int, largest: float) -> int:
    """q of the grid 2^-q: the largest whole number for which `num_sites · largest · 2^q < 2^31`.

    `largest`: L2 norm (or size, of a single number) of what one site adds, at most. May be negative.
    """
    if not (num_sites > 0 and math.isfinite(largest) and largest > 0):
        raise ValueError(f"Expected sites, and a finite bound > 0; got {num_sites} and {largest}.")
    _, exponent = math.frexp(num_sites * largest)  # the product is below 2^exponent
    return _BITS - exponent


def rounding_length(num_values: int, bits: int) -> float:
    """By how much rounding to the grid lengthens a vector in L2, at most: half a step in each value."""
    return math.sqrt(num_values) * 2.0 ** -(bits + 1)


def to_grid(values: Floats, bits: int) -> None:
    """Move values to the nearest on the grid 2^-`bits`, in place; exact, as a float32 beyond 2^24 steps is on
    the grid already."""
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        np.multiply(block, np.float32(2.0**bits), out=block)
        np.rint(block, out=block)
        np.multiply(block, np.float32(2.0**-bits), out=block)


def encode(values: Floats, bits: int, into: Ring) -> None:
    """Write values as whole steps of the grid into the ring; `into` may be their own memory.

    Raises `ValueError` for a value that is not finite, or beyond 2^31 steps.
    """
    scratch = np.empty(min(_BLOCK, len(values)), dtype=np.float32)
    whole = into.view(np.int32)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        steps = scratch[: len(block)]
        np.multiply(block, np.float32(2.0**bits), out=steps)
        np.rint(steps, out=steps)
        if not float(np.abs(steps).max()) < 2.0**_BITS:  # NaN, too
            raise ValueError("Expected finite values within the ring; got larger ones, NaN or infinity.")
        np.copyto(whole[start : start + len(block)], steps, casting="unsafe")


def decode(sums: Ring, bits: int) -> NDArray[np.float64]:
    """The sums that these ring elements stand for."""
    return sums.view(np.int32) * np.float64(2.0**-bits)
