from dataclasses import dataclass
from typing import Any

import pytest
import torch

from federation.exchanges.erasure import (
    POOLED,
    SUMS,
    ErasureSums,
    erasure_shapes,
    erasure_sums,
    erasure_tensors,
    numbers_told,
    pooled_bound,
    share_bound,
)
from meduet_models.content_code import CodeSums, code_bound


@dataclass
class Network:
    code_size: int = 8
    width: int = 12


@dataclass
class Plan:
    network: Any


PLAN: Any = Plan(Network())


def sums(patients: int) -> ErasureSums:
    draws, who = torch.Generator().manual_seed(patients), [str(n) for n in range(patients)]
    codes, pooled = (50 * torch.randn(patients, k, generator=draws) for k in (8, 12))
    return ErasureSums(CodeSums.of(codes, who, code_bound(8)), CodeSums.of(pooled, who, pooled_bound(PLAN)))


def length(told: ErasureSums) -> float:
    return float(torch.cat([told.codes.to_vector(), told.pooled.to_vector()]).norm())


def test_sums_come_back_as_they_left() -> None:
    sent = erasure_tensors(sums(5))
    back, told = erasure_sums(sent, PLAN), sums(5)
    assert torch.equal(back.codes.to_vector(), told.codes.to_vector())
    assert torch.equal(back.pooled.to_vector(), told.pooled.to_vector())
    assert {name: tuple(t.shape) for name, t in sent.items()} == erasure_shapes(PLAN)


def test_what_leaves_is_two_vectors_and_no_products() -> None:
    assert erasure_shapes(PLAN) == {SUMS: (1 + 8,), POOLED: (1 + 12,)}
    assert numbers_told(PLAN) == 8 + 12


def test_one_patients_share_is_never_longer_than_the_promise() -> None:
    for patients in (1, 2, 7):
        assert length(sums(patients)) <= patients * share_bound(PLAN) * (1 + 1e-12)
    assert length(sums(1)) == pytest.approx(share_bound(PLAN))  # and it is reached


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {SUMS: torch.zeros(9)},
        {SUMS: torch.zeros(5, 9), POOLED: torch.zeros(13)},
        {SUMS: torch.zeros(8), POOLED: torch.zeros(13)},
        {SUMS: torch.zeros(9), POOLED: torch.zeros(12)},
    ],
)
def test_anything_else_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="code sums"):
        erasure_sums(tensors, PLAN)
