"""The area under the curve against values computed by hand."""

import numpy as np
import pytest
import torch

from meduet_models.downstream.classification import Classification
from meduet_models.downstream.task import Grid, Target

GRID = Grid(spacing_mm=(1.0, 1.0, 1.0), tolerance_mm=1.0)


def auc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    measured = Classification().measure(scores, truth, Target("sex", ("F", "M")), GRID)["auc"]
    assert callable(measured)
    return measured(np.arange(len(truth)))


def test_the_area_under_the_curve() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    truth = torch.tensor([0, 0, 1, 1])
    assert auc(scores, truth) == pytest.approx(0.75)
    assert np.isnan(auc(scores[:2], truth[:2]))  # one class only
    assert auc(torch.eye(3)[torch.tensor([0, 1, 2, 0])], torch.tensor([0, 1, 2, 0])) == 1.0
