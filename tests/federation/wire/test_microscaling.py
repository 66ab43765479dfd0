"""MXINT8 against its definition, and what the gate and the journals rely on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from federation.wire.microscaling import BLOCK, GROWTH, decode, encode, num_blocks

VALUES = arrays.arrays(np.float32, st.integers(0, 100), elements=st.floats(-(2.0**127), 2.0**127, width=32))


def as_defined(block: np.ndarray) -> np.ndarray:
    """A block by the words of the specification, in float64; sizes that float32 holds as normal numbers."""
    largest = float(np.abs(block).max(initial=0.0))
    if largest == 0.0:
        return np.zeros(len(block))
    scale = 2.0 ** np.floor(np.log2(largest))
    return np.clip(np.rint(block.astype(np.float64) / scale * 64), -127, 127) * scale / 64


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.integers(0, 2**31), st.floats(-80, 80))
def test_each_block_is_as_the_specification_has_it(size: int, seed: int, magnitude: float) -> None:
    spread = np.random.default_rng(seed).normal(size=(2, size))
    plain = (spread[0] * 2.0 ** (magnitude + 4 * spread[1])).astype(np.float32)
    back = decode(*encode(torch.from_numpy(plain))).numpy()
    expected = [as_defined(plain[i : i + BLOCK]) for i in range(0, size, BLOCK)]
    np.testing.assert_array_equal(back, np.concatenate([np.zeros(0), *expected]).astype(np.float32))


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_was_rounded_is_not_changed_by_rounding_it_again(values: np.ndarray) -> None:
    first = encode(torch.from_numpy(values))
    once = decode(*first)
    again = encode(once)
    assert torch.equal(decode(*again), once)
    assert torch.equal(again[0], first[0])
    occupied = [i for i in range(len(first[1])) if bool(first[0][i * BLOCK : (i + 1) * BLOCK].any())]
    assert torch.equal(again[1][occupied], first[1][occupied])


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_a_value_is_off_by_a_64th_of_its_blocks_largest_and_the_whole_hardly_grows(
    values: np.ndarray,
) -> None:
    tensor = torch.from_numpy(values)
    back = decode(*encode(tensor)).double()
    smallest = 2.0**-126  # one unit of the smallest exponent
    for start in range(0, len(values), BLOCK):
        block = tensor[start : start + BLOCK].double()
        off = (back[start : start + BLOCK] - block).abs().max()
        assert off <= max(float(block.abs().max()) / 64, smallest / 2)
    assert back.norm() <= tensor.double().norm() * (1 + GROWTH) + smallest * len(values)


def test_a_byte_per_value_and_one_per_block() -> None:
    values, exponents = encode(torch.randn(7, 11))
    assert (values.dtype, values.shape) == (torch.int8, (77,))
    assert (exponents.dtype, exponents.shape) == (torch.uint8, (num_blocks(77),)) == (torch.uint8, (3,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_value_that_is_not_finite_is_none(bad: float) -> None:
    tensor = torch.ones(3 * BLOCK)
    tensor[40] = bad
    back = decode(*encode(tensor))
    assert back[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(back[:BLOCK], torch.ones(BLOCK)) and torch.equal(back[2 * BLOCK :], torch.ones(BLOCK))


def test_long_tensors_are_rounded_block_by_block_as_short_ones(rows: int = 3000) -> None:
    tensor = torch.randn(rows, BLOCK, generator=torch.Generator().manual_seed(0))
    whole = decode(*encode(tensor)).view(rows, BLOCK)
    for row in range(0, rows, 97):
        assert torch.equal(whole[row], decode(*encode(tensor[row])))
    assert not torch.equal(whole, tensor)
