import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.clipping import clip, joint_norm

lengths = st.floats(1e-6, 1e6)


def tensors(seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator) * scale,
        "b": torch.randn(7, generator=generator) * scale,
        "c": torch.randn((), generator=generator) * scale,
    }


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), scale=lengths, norm=lengths)
def test_the_length_of_what_is_released_never_exceeds_the_bound(seed: int, scale: float, norm: float) -> None:
    bounded = clip(tensors(seed, scale), norm)
    assert joint_norm(bounded.value) <= norm
    assert bounded.bound == norm


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=lengths, factor=st.floats(0.99, 1.01))
def test_a_length_near_the_bound_does_not_slip_over_it(seed: int, scale: float, factor: float) -> None:
    value = tensors(seed, scale)
    norm = factor * joint_norm(value)
    assert joint_norm(clip(value, norm).value) <= norm


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), scale=lengths, norm=lengths)
def test_clipping_keeps_the_direction_and_leaves_short_values_alone(
    seed: int, scale: float, norm: float
) -> None:
    before = tensors(seed, scale)
    bounded = clip(before, norm)
    factor = min(1.0, norm / joint_norm(before))
    for name, value in before.items():
        torch.testing.assert_close(bounded.value[name], value * factor, rtol=1e-5, atol=0)
    if factor == 1.0:
        assert all(torch.equal(bounded.value[name], value) for name, value in before.items())


def test_all_tensors_share_one_factor_so_that_a_long_one_shortens_its_neighbours() -> None:
    bounded = clip({"long": torch.full((100,), 10.0), "short": torch.ones(1)}, 1.0)
    assert float(bounded.value["short"]) == pytest.approx(1 / math.sqrt(100 * 100 + 1), rel=1e-5)


def test_zero_stays_zero_and_no_tensor_at_all_has_length_zero() -> None:
    assert torch.equal(clip({"a": torch.zeros(3)}, 1.0).value["a"], torch.zeros(3))
    assert clip({}, 1.0).norm_before == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite values"):
        clip({"fine": torch.ones(3), "bad": torch.tensor([0.0, bad])}, 1.0)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_bounds_nothing_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match="clipping norm"):
        clip({"a": torch.ones(3)}, norm)


def test_values_whose_squares_overflow_are_measured_all_the_same() -> None:
    huge = torch.full((4,), 1e200, dtype=torch.float64)
    assert joint_norm({"a": huge}) == pytest.approx(2e200)
    assert joint_norm({"a": torch.full((4,), 3e38)}) == pytest.approx(6e38, rel=1e-6)


def test_clipping_does_not_touch_its_input() -> None:
    value = torch.full((4,), 10.0)
    clip({"a": value}, 1.0)
    kept = clip({"a": value}, 100.0).value["a"]
    kept.zero_()
    assert torch.equal(value, torch.full((4,), 10.0))
