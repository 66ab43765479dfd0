"""Distances between sets of features, against closed forms and sets whose fault is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meduet_models.sample_quality import (
    frechet_distance,
    kernel_distance,
    nearest,
    neighbourhoods,
    principal_axes,
)


def drawn(count: int, width: int, seed: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + deviation * values


def exact_moments(values: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """The same scans, moved and stretched until their sample mean and covariance are these."""
    centred = values - values.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(values.T))).T
    return mean + whitened @ torch.linalg.cholesky(covariance).T


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    # commuting covariances: the distance is |difference of means|² + the sum of (difference of deviations)²
    a = exact_moments(
        drawn(60, 3, 0), torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    )
    b = exact_moments(
        drawn(80, 3, 1),
        torch.tensor([1.0, 0, 2]).double(),
        torch.diag(torch.tensor([4.0, 4.0, 1.0])).double(),
    )
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)


def test_the_frechet_distance_of_covariances_that_do_not_commute() -> None:
    one = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    two = torch.tensor([[1.0, -0.5], [-0.5, 2.0]]).double()
    zero = torch.zeros(2).double()
    a, b = exact_moments(drawn(50, 2, 0), zero, one), exact_moments(drawn(50, 2, 1), zero, two)
    # for 2 x 2, the trace of the root of a product is sqrt(trace + 2 sqrt(det))
    product = one @ two
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    assert frechet_distance(a, b) == pytest.approx(float(one.trace() + two.trace()) - 2 * root, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), few=st.integers(2, 6))
def test_the_frechet_distance_is_symmetric_and_zero_for_equal_sets_also_with_few_scans(
    seed: int, few: int
) -> None:
    a, b = drawn(few, 8, seed), drawn(few + 1, 8, seed + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_sees_three_times_the_deviation_at_the_same_mean() -> None:
    real, same = drawn(150, 4, 0), drawn(150, 4, 1)
    wide = drawn(150, 4, 2, deviation=3.0)
    wide = wide - wide.mean(0) + real.mean(0)
    assert kernel_distance(real, wide) > 100 * abs(kernel_distance(real, same))


def test_the_kernel_distance_is_unbiased_for_small_sets() -> None:
    # the mean over 400 pairs of sets of 8; false alarm below 1e-4 at four standard errors
    values = torch.tensor([kernel_distance(drawn(8, 3, 2 * i), drawn(8, 3, 2 * i + 1)) for i in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values))
    assert float(values.min()) < 0


def test_a_scan_counted_twice_is_not_compared_with_itself() -> None:
    real, generated = drawn(9, 3, 0), drawn(7, 3, 1)
    twice = torch.full((9,), 2.0).double()
    once = torch.ones(9).double()
    once[4] = 0
    left_out = torch.cat([real[:4], real[5:]])
    assert kernel_distance(real, generated, once) == pytest.approx(
        kernel_distance(left_out, generated), rel=1e-9
    )
    even = kernel_distance(real, generated, twice)
    assert even == pytest.approx(kernel_distance(real, generated), rel=1e-9)


def test_a_dropped_mode_lowers_recall_and_coverage_and_leaves_precision() -> None:
    left, right = drawn(60, 4, 0), drawn(60, 4, 1, mean=30.0)
    found = neighbourhoods(torch.cat([left, right]), drawn(60, 4, 2))
    assert float(found.precise.double().mean()) > 0.9
    assert float(found.recalled[:60].double().mean()) > 0.9
    assert not found.recalled[60:].any()
    assert not found.covered[60:].any()


def test_an_invented_mode_lowers_precision_and_density_and_leaves_recall() -> None:
    real = drawn(80, 4, 0)
    found = neighbourhoods(real, torch.cat([drawn(40, 4, 1), drawn(40, 4, 2, mean=30.0)]))
    assert float(found.precise[:40].double().mean()) > 0.8
    assert not found.precise[40:].any()
    assert float(found.density[40:].sum()) == 0
    assert float(found.recalled.double().mean()) > 0.6


def test_equal_distributions_have_density_and_coverage_near_their_expectation() -> None:
    # arXiv:2002.09797: density is 1 on average; coverage 1 - C(2n-k..)/.. is about 1 - 2^-k for equal sizes
    found = neighbourhoods(drawn(400, 3, 0), drawn(400, 3, 1), neighbours=5)
    assert float(found.density.mean()) == pytest.approx(1.0, abs=0.15)
    assert float(found.covered.double().mean()) == pytest.approx(1 - 2**-5, abs=0.04)


def test_a_copy_is_at_distance_zero_and_named() -> None:
    others = drawn(20, 5, 0)
    distance, which = nearest(others[[7, 3]], others)
    assert which.tolist() == [7, 3]
    assert distance.tolist() == [0, 0]


def test_principal_axes_are_fitted_on_real_scans_and_never_more_than_there_are() -> None:
    real = drawn(10, 30, 0)
    axes = principal_axes(real, 64)
    assert axes(real).shape == (10, 9)
    assert float(axes(real).var(0).mean()) == pytest.approx(1.0)
    assert float(axes(real).mean(0).abs().max()) < 1e-9
    moved = axes(real + 2.0 * real.std(0))
    assert float((moved - axes(real)).norm(dim=1).min()) > 0


def test_a_constant_feature_does_no_harm() -> None:
    real = torch.cat([drawn(12, 3, 0), torch.full((12, 1), 7.0).double()], 1)
    assert bool(principal_axes(real, 3)(real).isfinite().all())


@pytest.mark.parametrize("call", [frechet_distance, kernel_distance])
def test_one_scan_has_no_distribution(call: object) -> None:
    with pytest.raises(ValueError, match="two scans on both sides"):
        call(drawn(1, 2, 0), drawn(5, 2, 1))  # type: ignore[operator]


def test_too_few_scans_for_a_neighbourhood_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 scans"):
        neighbourhoods(drawn(3, 2, 0), drawn(9, 2, 1))
