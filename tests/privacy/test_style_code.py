"""The sensitivity of a style code, in thousands of cases, and wirings that the same cases catch."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from privacy.public_axes import COUNT_SHARE
from privacy.style_code import SHARE_BOUND, StyleCode

NUMBERS, DIMENSIONS, CASES = 12, 5, 5_000
_MIXED = torch.randn(NUMBERS, NUMBERS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def public(count: int = 200, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, NUMBERS, generator=draws, dtype=torch.float64) @ _MIXED + 3.0


CODE = StyleCode.of(public(), DIMENSIONS)


def patient(rng: np.random.Generator) -> Tensor:
    """A vector: usual, far too long, along one axis, nothing, or no numbers at all."""
    usual = torch.from_numpy(rng.standard_normal(NUMBERS)) @ _MIXED + 3.0
    match rng.integers(8):
        case 0:
            return usual * 10.0 ** rng.uniform(-3, 30)
        case 1:
            return CODE.centre + CODE.back[:, 0] * 10.0 ** rng.uniform(0, 6) * rng.choice([-1.0, 1.0])
        case 2:
            return torch.zeros(NUMBERS, dtype=torch.float64)
        case 3:
            usual[int(rng.integers(NUMBERS))] = float(rng.choice([math.nan, math.inf, -math.inf, 1e308]))
            return usual
        case 4:
            return CODE.centre.clone()
        case _:
            return usual


Total = Callable[[Sequence[Tensor]], Tensor]


def largest_change(total: Total, cases: int, seed: int = 0) -> float:
    """The most that adding, removing or replacing one patient moved a total, over its bound."""
    rng, worst = np.random.default_rng(seed), 0.0
    for _ in range(cases):
        cohort = [patient(rng) for _ in range(int(rng.integers(0, 6)))]
        other, allowed = list(cohort), SHARE_BOUND
        match rng.integers(3):
            case 0:
                other.insert(int(rng.integers(len(cohort) + 1)), patient(rng))
            case 1 if cohort:
                del other[int(rng.integers(len(cohort)))]
            case _ if cohort:
                other[int(rng.integers(len(cohort)))] = patient(rng)
                allowed = 2 * SHARE_BOUND
        change = float((total(other) - total(cohort)).norm()) / allowed
        worst = max(worst, change if math.isfinite(change) else math.inf)
    return worst


def test_one_patient_never_moves_a_code_by_more_than_the_bound() -> None:
    assert 0.999 < largest_change(CODE.total, CASES) <= 1 + 1e-9


def cut_together(cohort: Sequence[Tensor]) -> Tensor:
    """As if the sum, and not each patient's part, were cut."""
    codes = [CODE.axes @ (x - CODE.centre) for x in cohort]
    summed = torch.nan_to_num(sum(codes, start=torch.zeros(DIMENSIONS, dtype=torch.float64)))
    return summed / max(1.0, float(summed.norm()) / max(1, len(cohort)))


def mean_of_those_there(cohort: Sequence[Tensor]) -> Tensor:
    """As if the sum were divided by how many there are, and called a sum of as many as are expected."""
    total = CODE.total(cohort)
    return 20 * total / max(1.0, float(total[-1]) / COUNT_SHARE)


def without_a_look_at_infinity(cohort: Sequence[Tensor]) -> Tensor:
    parts = [CODE.axes @ (x - CODE.centre) for x in cohort]
    return sum((p / max(1.0, float(p.norm())) for p in parts), start=torch.zeros(DIMENSIONS).double())


@pytest.mark.parametrize("wiring", [cut_together, mean_of_those_there, without_a_look_at_infinity])
def test_the_same_cases_catch_a_wrong_wiring(wiring: Total) -> None:
    assert largest_change(wiring, 500) > 1.2


def test_nine_of_ten_public_scans_are_not_cut_and_the_axes_vary_alike() -> None:
    codes = (public() - CODE.centre) @ CODE.axes.T
    lengths = codes.norm(dim=1)
    assert 0.88 < float((lengths <= 1).double().mean()) < 0.92
    assert torch.allclose(codes.std(0), codes.std(0).mean().expand(DIMENSIONS), rtol=1e-6)


def test_what_is_told_is_read_back_along_the_axes() -> None:
    code = StyleCode.of(public(), NUMBERS)
    vectors = [code.centre + 0.3 * (x - code.centre) for x in public(40, seed=5)]  # none is cut
    vectors = [x for x in vectors if float((code.axes @ (x - code.centre)).norm()) < 1]
    total = code.total(vectors)
    assert code.count(total) == pytest.approx(len(vectors))
    assert torch.allclose(code.read(total), torch.stack(vectors).mean(0))


def test_a_code_longer_than_patients_can_have_is_read_as_the_longest() -> None:
    noised = torch.tensor([50.0, 0.0, 0.0, 0.0, 0.0, -3.0], dtype=torch.float64)  # "-6 patients"
    assert CODE.count(noised) == -6
    assert torch.allclose(CODE.read(noised), CODE.centre + CODE.back[:, 0])


@pytest.mark.parametrize(
    ("vectors", "dimensions", "sentence"),
    [
        (public(5), 5, "more than 5 public scans"),
        (public(50), 13, "at least as many numbers; got 50 of 12"),
        (torch.full((50, 12), torch.nan), 3, "finite"),
        (torch.ones(50, 12), 3, "vary in 3 ways"),
    ],
)
def test_public_scans_that_give_no_axes_are_refused(vectors: Tensor, dimensions: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StyleCode.of(vectors, dimensions)
