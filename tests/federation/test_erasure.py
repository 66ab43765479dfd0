from dataclasses import dataclass
from typing import Any

import pytest
import torch

from federation.exchanges.erasure import SUMS, erasure_shapes, erasure_sums, erasure_tensors, share_bound
from meduet_models.content_code import CodeSums, code_bound


@dataclass
class Network:
    code_size: int = 8


@dataclass
class Plan:
    network: Any


PLAN: Any = Plan(Network())


def sums(patients: int) -> CodeSums:
    codes = 50 * torch.randn(patients, 8, generator=torch.Generator().manual_seed(patients))
    return CodeSums.of(codes, [str(n) for n in range(patients)], code_bound(8))


def test_sums_come_back_as_they_left() -> None:
    sent = erasure_tensors(sums(5))
    assert torch.equal(erasure_sums(sent, PLAN).to_vector(), sums(5).to_vector())
    assert {name: tuple(t.shape) for name, t in sent.items()} == erasure_shapes(PLAN)


def test_what_leaves_is_one_vector_and_no_products() -> None:
    assert erasure_shapes(PLAN) == {SUMS: (1 + 8,)}


def test_one_patients_share_is_never_longer_than_the_promise() -> None:
    for patients in (1, 2, 7):
        assert float(sums(patients).to_vector().norm()) <= patients * share_bound(PLAN) * (1 + 1e-12)
    assert float(sums(1).to_vector().norm()) == pytest.approx(share_bound(PLAN))  # and it is reached


@pytest.mark.parametrize(
    "tensors",
    [{}, {"other": torch.zeros(9)}, {SUMS: torch.zeros(5, 9)}, {SUMS: torch.zeros(8)}],
)
def test_anything_else_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="code sums"):
        erasure_sums(tensors, PLAN)
