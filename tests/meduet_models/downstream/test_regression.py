"""A number per scan: its range, its errors in its own unit, and what is no number."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meduet_models.downstream.regression import Regression
from meduet_models.downstream.task import Grid, Target

AGE = Target("age", ("20", "90"))
GRID = Grid(spacing_mm=(1.0, 1.0, 1.0), tolerance_mm=1.0)
TASK = Regression()


class Patients:
    """Scans of which only covariates are known."""

    def __init__(self, *ages: str | float) -> None:
        self.covariates: Sequence[Mapping[str, str | float]] = [{"age": age} for age in ages]
        self.has_label = [False] * len(ages)

    def labels(self, indices: Sequence[int], view: int = 0) -> None:
        return None


@given(st.lists(st.floats(20, 90), min_size=2, max_size=20))
def test_errors_are_told_in_the_unit_of_the_covariate_whatever_the_range(ages: list[float]) -> None:
    answers = TASK.answers(Patients(*ages), range(len(ages)), AGE)
    assert bool((answers.abs() <= 1).all())
    wrong = (answers - 2 * 3.5 / 70).clamp(-1, 1)  # three and a half years younger
    measured = TASK.measure(wrong.unsqueeze(1), answers, AGE, GRID)
    error = measured["mae"]
    assert isinstance(error, np.ndarray)
    assert error.max() <= 3.5 + 1e-4
    assert all(error[row] == pytest.approx(3.5, abs=1e-4) for row, age in enumerate(ages) if age > 24)


def test_r2_is_one_for_the_truth_and_nothing_for_its_mean() -> None:
    truth = torch.tensor([-0.5, 0.0, 0.5])
    for predicted, expected in ((truth, 1.0), (truth.mean().expand(3), 0.0)):
        r2 = TASK.measure(predicted.unsqueeze(1), truth, AGE, GRID)["r2"]
        assert callable(r2)
        assert r2(np.arange(3)) == pytest.approx(expected)
        assert np.isnan(r2(np.array([1, 1])))  # one number only: nothing to explain


def test_only_a_number_is_known_and_beyond_the_range_it_is_cut_off() -> None:
    patients = Patients(55.0, "", "unknown", "nan", 140.0)
    assert [row for row in range(5) if TASK.known(patients, row, AGE)] == [0, 4]
    assert TASK.answers(patients, [0, 4], AGE).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("values", [(), ("20",), ("90", "20"), ("a", "b"), ("0", "inf"), ("1", "2", "3")])
def test_what_is_no_range_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="lowest and the highest"):
        TASK.check(1, Target("age", values))
    with pytest.raises(ValueError, match="classes to be 1"):
        TASK.check(2, AGE)
