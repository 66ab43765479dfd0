"""Protected moments: what one patient moves, and that what is read is worth what noise leaves of it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from privacy.latent_moments import SHARE_BOUND, LatentMoments, Spread
from privacy.public_axes import COUNT_SHARE

PUBLIC = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 40)
AXES = LatentMoments.of(PUBLIC, 4)


def latents_of(rng: np.random.Generator) -> Tensor:
    latents = torch.from_numpy(rng.standard_normal(40)).float() * 10.0 ** float(rng.uniform(-6, 30))
    if rng.integers(6) == 0:
        latents[int(rng.integers(40))] = float(rng.choice([math.nan, math.inf, -math.inf, 3e38, 0.0]))
    return latents


def worst_of(share: object, cases: int, rng: np.random.Generator) -> float:
    """The most that adding, removing or replacing one patient moves a sum, over what is allowed."""

    def total(cohort: list[Tensor]) -> Tensor:
        return sum((share(one) for one in cohort), start=torch.zeros(9, dtype=torch.float64))  # type: ignore[operator]

    worst = 0.0
    for _ in range(cases):
        cohort = [latents_of(rng) for _ in range(int(rng.integers(0, 3)))]
        other, allowed = list(cohort), SHARE_BOUND
        if cohort and rng.integers(2):
            other[0], allowed = latents_of(rng), 2 * SHARE_BOUND
        else:
            other.append(latents_of(rng))
        worst = max(worst, float((total(other) - total(cohort)).norm()) / allowed)
    return worst


def test_a_patient_never_moves_the_moments_by_more_than_the_bound() -> None:
    assert 0.9 < worst_of(AXES.share, 2000, np.random.default_rng(0)) <= 1 + 1e-9


def test_squares_of_what_was_not_cut_are_what_the_bound_would_not_hold() -> None:
    """A wrong wiring: coefficients are cut, their squares are taken before."""

    def wrong(latents: Tensor) -> Tensor:
        code = (AXES.axes @ (latents.double() - AXES.centre)).nan_to_num(0, 0, 0)
        cut = code / max(1.0, float(code.norm()))
        return torch.cat([cut, code.square(), torch.tensor([COUNT_SHARE], dtype=torch.float64)])

    assert worst_of(wrong, 300, np.random.default_rng(0)) > 10


def test_without_noise_the_moments_are_those_of_the_patients() -> None:
    draws = torch.Generator().manual_seed(1)
    codes = 0.1 * torch.randn(4000, 4, generator=draws, dtype=torch.float64) + torch.tensor([0.3, 0, -0.2, 0])
    latents = AXES.centre + codes @ AXES.back.T
    spread = AXES.read(AXES.total(latents), 0.0)
    assert AXES.count(AXES.total(latents)) == pytest.approx(4000)
    assert torch.allclose(spread.mean, codes.mean(0), atol=1e-6)
    assert torch.allclose(spread.variance, codes.var(0, unbiased=False), atol=1e-6)


def test_where_noise_tells_nothing_the_public_spread_is_read() -> None:
    spread = AXES.read(AXES.total(AXES.centre[None]), 1e9)
    assert torch.allclose(spread.mean, AXES.public.mean, atol=1e-6)
    assert torch.allclose(spread.variance, AXES.public.variance, atol=1e-6)
    assert torch.allclose(AXES.moved(PUBLIC, spread), PUBLIC.double(), atol=1e-4)


def test_moved_latents_have_the_mean_and_the_spread_and_keep_the_rest() -> None:
    wanted = Spread(torch.tensor([0.3, 0, -0.2, 0.1]).double(), torch.tensor([0.1, 0.2, 0.01, 0.3]).double())
    moved = AXES.moved(PUBLIC, wanted)
    along = (moved - AXES.centre) @ AXES.axes.T
    assert torch.allclose(along.mean(0), wanted.mean, atol=1e-6)
    assert torch.allclose(along.var(0, unbiased=False), wanted.variance, atol=1e-6)
    change, along = moved - PUBLIC.double(), torch.linalg.qr(AXES.back).Q
    assert torch.allclose(change, change @ along @ along.T, atol=1e-6)


@pytest.mark.parametrize(
    ("public", "dimensions", "sentence"),
    [
        (PUBLIC[:4], 4, "more than 4 public scans"),
        (PUBLIC * math.nan, 4, "finite public scans"),
        (PUBLIC[:1].repeat(9, 1), 4, "vary in 4 ways"),
    ],
)
def test_public_scans_that_give_no_axes_are_refused(public: Tensor, dimensions: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LatentMoments.of(public, dimensions)
