from dataclasses import dataclass
from typing import Any

import pytest
import torch

from federation.exchanges.erasure import (
    SUMS,
    content_bound,
    erasure_moments,
    erasure_shapes,
    erasure_tensors,
    share_bound,
)
from meduet_models.content_code import RenderingMoments
from meduet_models.erasure import ErasureMoments


@dataclass
class Network:
    width: int = 8


@dataclass
class Style:
    exchange: str


@dataclass
class Plan:
    network: Any
    style: Style


PLAN: Any = Plan(Network(), Style("bank"))
QUIET: Any = Plan(Network(), Style("none"))


def moments(patients: int) -> ErasureMoments:
    generator = torch.Generator().manual_seed(patients)
    content = 5 * torch.randn(patients, 8, generator=generator)
    return ErasureMoments.of(content, [str(n) for n in range(patients)], content_bound(PLAN))


def renderings(patients: int) -> RenderingMoments:
    generator = torch.Generator().manual_seed(100 + patients)
    content = 50 * torch.randn(2, 1, 8, generator=generator).repeat(1, patients, 1)
    return RenderingMoments.of(content, [str(n) for n in range(patients)], content_bound(PLAN))


def test_sums_come_back_as_they_left() -> None:
    sent = erasure_tensors(moments(5), renderings(5))
    again, varied = erasure_moments(sent, PLAN)
    torch.testing.assert_close(again.to_vector(), moments(5).to_vector())
    assert varied is not None
    torch.testing.assert_close(varied.scatter, renderings(5).scatter)
    assert {name: tuple(t.shape) for name, t in sent.items()} == erasure_shapes(PLAN)


def test_without_a_bank_nothing_is_said_of_renderings() -> None:
    sent = erasure_tensors(moments(5), None)
    assert {name: tuple(t.shape) for name, t in sent.items()} == erasure_shapes(QUIET)
    assert erasure_moments(sent, QUIET)[1] is None
    with pytest.raises(ValueError, match="vectors sums, renderings; got 1 other tensors"):
        erasure_moments(sent, PLAN)


def test_one_patients_share_is_never_longer_than_the_promise() -> None:
    for patients in (1, 2, 7):
        sums = torch.cat([moments(patients).to_vector(), renderings(patients).to_vector()])
        assert float(sums.norm()) <= patients * share_bound(PLAN) * (1 + 1e-12)
        assert float(moments(patients).to_vector().norm()) <= patients * share_bound(QUIET) * (1 + 1e-12)
    assert float(moments(1).to_vector().norm()) == pytest.approx(share_bound(QUIET))  # and it is reached


@pytest.mark.parametrize(
    "tensors",
    [{}, {"other": torch.zeros(45)}, {SUMS: torch.zeros(5, 9)}, {SUMS: torch.zeros(44)}],
)
def test_anything_else_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="content sums"):
        erasure_moments(tensors, PLAN)
