"""MXINT8: a byte per value and a shared exponent per block of 32 values.

Each block has a scale, a power of two that fits its largest magnitude, and its values are whole numbers from
-127 to 127 of 1/64 of the scale. All of it is exact but the rounding itself (half to even): the same bits on
every machine, and what was rounded once is not changed by rounding it again, so that site and centre hash the
same values. A value is off by at most 1/64 of its block's largest magnitude.
What this file does not do: decide what travels like this (`federation/wire/wire.py`).

Source: OCP Microscaling Formats (MX) v1.0, section 6.3; blocks here run along a tensor's values in row-major
order, the last one may be shorter.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 32
"""Values that share a scale."""
GROWTH = 2.0**-4
"""A vector grows in L2 norm by less than this share: each of 32 values is off upwards by at most 1/128 of a
scale that is at most their largest magnitude, all of them together by sqrt(32) / 128 of it."""
_BIAS, _NAN = 127, 255  # of the exponents (E8M0)
_FRACTION_BITS, _LARGEST = 6, 127
_LEAST = 7  # a smaller unit would be subnormal in float32: such values become a few units or zero
_AT_ONCE = 1 << 15  # values that stay in the processor's cache
_UNITS = torch.from_numpy(
    np.append(
        np.ldexp(np.ones(_NAN, np.float32), np.arange(_NAN) - _BIAS - _FRACTION_BITS), np.float32("nan")
    )
)
"""What 1 is worth in a block, by the block's exponent."""


def num_blocks(size: int) -> int:
    """Blocks, and so scales, of so many values."""
    return -(-size // BLOCK)


def encode(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as int8 values [n] and uint8 exponents [blocks]; a block with NaN or infinity becomes
    NaN as a whole."""
    flat = tensor.detach().cpu().reshape(-1)
    values = torch.empty(len(flat), dtype=torch.int8)
    exponents = torch.empty(num_blocks(len(flat)), dtype=torch.uint8)
    for start in range(0, len(flat), _AT_ONCE):
        end, first = start + _AT_ONCE, start // BLOCK
        last = first + _AT_ONCE // BLOCK
        _encode(flat[start:end], values[start:end], exponents[first:last])
    return values, exponents


def _encode(piece: Tensor, values: Tensor, exponents: Tensor) -> None:
    blocks = _blocks(piece)
    largest = blocks.abs().amax(1)
    codes = torch.frexp(largest).exponent.add_(_BIAS - 1).clamp_(_LEAST, _NAN - 1)
    finite = largest.isfinite()
    if not finite.all():
        codes[~finite] = _NAN
        blocks = blocks.masked_fill(~finite[:, None], 0.0)
    per_unit = (1.0 / _UNITS[codes]).nan_to_num_(1.0)  # exact: a power of two
    rounded = (blocks * per_unit[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    values.copy_(rounded.view(-1)[: len(piece)])
    exponents.copy_(codes)


def decode(values: Tensor, exponents: Tensor) -> Tensor:
    """int8 values [n] and uint8 exponents [blocks] as float32 [n]."""
    return (_blocks(values) * _UNITS[exponents.int()][:, None]).view(-1)[: len(values)]


def _blocks(flat: Tensor) -> Tensor:
    return (pad(flat, (0, -len(flat) % BLOCK)) if len(flat) % BLOCK else flat).view(-1, BLOCK)
