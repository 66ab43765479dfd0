import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from meduet_models.erasure import ErasureMoments, erase, erasure_length, fit_erasure, patient_means

WIDTH = 12


def features(site: int, count: int = 60) -> Tensor:
    """Correlated content, shifted by the site along a direction of its own."""
    generator = torch.Generator().manual_seed(site)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    shift = 2.0 * torch.randn(WIDTH, generator=generator)
    return torch.randn(count, WIDTH, generator=generator) @ mixing + shift


def sums(x: Tensor, bound: float = 1e3) -> ErasureMoments:
    return ErasureMoments.of(x, [str(i) for i in range(len(x))], bound)


def fitted() -> tuple[Tensor, Tensor]:
    x = torch.cat(list(SITES.values())).double()
    means = torch.stack([own.double().mean(0) for own in SITES.values()])
    return fit_erasure(means, torch.cov(x.T, correction=0))


SITES = {name: features(site, 40 + 10 * site) for site, name in enumerate(("oslo", "lyon", "turin"))}
MOMENTS = {name: sums(x) for name, x in SITES.items()}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), a=st.integers(1, 6), b=st.integers(1, 6))
def test_sums_of_two_sites_are_the_sums_of_their_union(seed: int, a: int, b: int) -> None:
    x = torch.randn(a + b, 5, generator=torch.Generator().manual_seed(seed))
    one, other = sums(x[:a], 1.5), sums(x[a:], 1.5)
    torch.testing.assert_close((one + other).to_vector(), one.to_vector() + other.to_vector())
    torch.testing.assert_close((one + other).to_vector(), sums(x, 1.5).to_vector())
    back = ErasureMoments.from_vector(one.to_vector(), 5, 1.5)
    torch.testing.assert_close(back.outer, one.outer)
    torch.testing.assert_close(back.total, one.total)
    assert len(one.to_vector()) == erasure_length(5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), bound=st.floats(0.1, 10.0), scale=st.floats(0.1, 100.0))
def test_one_patient_moves_the_vector_by_at_most_its_bound_squared_plus_one(
    seed: int, bound: float, scale: float
) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) * scale
    moved = sums(x, bound).to_vector() - sums(x[:3], bound).to_vector()
    assert float(moved.norm()) <= (bound**2 + 1) * (1 + 1e-6)


def test_after_erasure_the_means_of_all_sites_coincide() -> None:
    mean, matrix = fitted()
    means = torch.stack([erase(x.double(), mean, matrix).mean(0) for x in SITES.values()])
    before = torch.stack([x.double().mean(0) for x in SITES.values()])
    assert float((before - before.mean(0)).norm()) > 1
    torch.testing.assert_close(means, means.mean(0).expand_as(means), rtol=0, atol=1e-6)


def test_after_erasure_a_linear_probe_knows_no_more_than_the_site_frequencies() -> None:
    x = torch.cat(list(SITES.values())).double()
    labels = [name for name, own in SITES.items() for _ in own]
    mean, matrix = fitted()
    seen = LogisticRegression(C=1e3, class_weight="balanced", max_iter=5000).fit(x, labels)
    assert seen.score(x, labels) > 0.9
    erased = erase(x, mean, matrix)
    probe = LogisticRegression(C=1e3, class_weight="balanced", max_iter=5000, tol=1e-8).fit(erased, labels)
    assert float(abs(probe.coef_).max()) < 1e-3  # nothing linear is left to fit: every scan reads alike


def test_erasing_twice_is_erasing_once_and_costs_at_most_one_dimension_per_further_site() -> None:
    _, matrix = fitted()
    torch.testing.assert_close(matrix @ matrix, matrix, rtol=0, atol=1e-9)
    assert int(torch.linalg.matrix_rank(torch.eye(WIDTH, dtype=torch.float64) - matrix, tol=1e-8)) == 2


def test_the_fit_moves_content_as_little_as_possible_in_the_metric_of_its_covariance() -> None:
    mean, matrix = fitted()
    x = torch.cat(list(SITES.values())).double()
    covariance = torch.cov(x.T, correction=0)
    covariance = 0.95 * covariance + 0.05 * covariance.diagonal().mean() * torch.eye(WIDTH)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ (values**-0.5).diag() @ vectors.T
    means = torch.stack([own.double().mean(0) for own in SITES.values()])
    span = whiten @ (means - means.mean(0)).T
    projector = span @ torch.linalg.pinv(span)
    torch.testing.assert_close(mean, means.mean(0))
    expected = torch.eye(WIDTH, dtype=torch.float64) - whiten.inverse() @ projector @ whiten
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-5)
    _, orthogonal = fit_erasure(means)
    torch.testing.assert_close(orthogonal, orthogonal.T, rtol=0, atol=1e-9)


def test_a_patient_with_many_scans_counts_once() -> None:
    x = features(0, 3)
    many = ErasureMoments.of(x[[0, 1, 1, 1, 2]], ["a", "b", "b", "b", "c"], 1e3)
    torch.testing.assert_close(many.to_vector(), sums(x).to_vector())
    assert torch.equal(patient_means(x[[2, 0, 2]], ["c", "a", "c"]), x[[2, 0]])


def test_sites_that_do_not_differ_lose_nothing() -> None:
    _, matrix = fit_erasure(torch.ones(2, WIDTH))
    torch.testing.assert_close(matrix, torch.eye(WIDTH, dtype=torch.float64))


def test_one_site_no_covariance_and_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two sites"):
        fit_erasure(torch.ones(1, WIDTH))
    with pytest.raises(ValueError, match="covariance is zero"):
        fit_erasure(torch.ones(2, WIDTH), torch.zeros(WIDTH, WIDTH))
    with pytest.raises(ValueError, match="finite content"):
        sums(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="bound"):
        MOMENTS["oslo"] + sums(features(1), 2.0)
    with pytest.raises(ValueError, match="91 content sums"):
        ErasureMoments.from_vector(torch.zeros(3), WIDTH, 1.0)
