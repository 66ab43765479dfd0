"""Labelled scans: nested shares of patients, known answers, one line for bad labels."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.latents.labelled import LabelledScans, NoLabels, join, labelled_scans
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from meduet_models.downstream.tasks import task_of

SEGMENTATION = LocalFinetuning(task="segmentation", classes=3)
CLASSIFICATION = LocalFinetuning(task="classification", classes=2)
REGRESSION = LocalFinetuning(task="regression", classes=1)


def some(patients: Sequence[str]) -> LabelledScans:
    count = len(patients)
    labels = torch.arange(count).reshape(-1, 1, 1, 1, 1) % 3
    return LabelledScans(torch.zeros(count, 1, 2, 2, 2), labels, tuple(patients), (0,) * count)


class Stored:
    """Four scans of three patients; the second has no label, the third no known sex."""

    patients = ("ann", "bob", "cid", "ann")
    covariates = ({"sex": "F", "stage": 2.0}, {"sex": "M"}, {}, {"sex": "F", "stage": 1.0})
    has_label = (True, False, True, True)
    site_index = torch.tensor([1, 1, 1, 1])

    def indices(self, split: str) -> list[int]:
        return [0, 1, 2, 3]

    def latents(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        return torch.tensor([float(i) for i in indices]).reshape(-1, 1, 1, 1, 1)

    def labels(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        return torch.tensor(list(indices)).reshape(-1, 1, 1, 1, 1)


@given(
    st.lists(st.text("abc", min_size=1), min_size=1, max_size=30),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(0, 5),
)
def test_a_larger_share_holds_a_smaller_one(names: list[str], one: float, other: float, seed: int) -> None:
    scans = some(names)
    small, large = (set(scans.share(share, seed).patients) for share in sorted((one, other)))
    assert small <= large
    assert small
    assert set(scans.share(1.0, seed).patients) == set(names)


def test_a_share_is_of_patients_and_depends_on_the_seed() -> None:
    scans = some([f"p{n // 2}" for n in range(40)])
    assert len(scans.share(0.1, 0).patients) == 2
    assert len(scans.share(0.1, 0)) == 4
    assert len(scans.share(0.01, 0).patients) == 1
    assert len({scans.share(0.1, seed).patients for seed in range(9)}) > 1


def test_only_scans_with_a_known_answer_are_taken() -> None:
    segmented = labelled_scans(Stored(), [0, 1, 2, 3], SEGMENTATION)
    assert segmented.patient == ("ann", "cid", "ann")
    assert segmented.answers.flatten().tolist() == [0, 2, 3]
    classified = labelled_scans(Stored(), [0, 1, 2, 3], CLASSIFICATION, "sex", ("M", "F"))
    assert classified.answers.tolist() == [1, 0, 1]
    assert classified.site == (1, 1, 1)
    staged = labelled_scans(Stored(), [0, 1, 2, 3], CLASSIFICATION, "stage", ("1", "2"))
    assert staged.answers.tolist() == [1, 0]
    numbers = labelled_scans(Stored(), [0, 1, 2, 3], REGRESSION, "stage", ("0", "4"))
    assert numbers.answers.tolist() == [0.0, -0.5]  # 2 and 1, where 0 to 4 is -1 to 1
    beyond = labelled_scans(Stored(), [0, 3], REGRESSION, "stage", ("0", "1.5"))
    assert beyond.answers.max() == 1.0  # cut off


def test_no_answer_at_all_is_said() -> None:
    with pytest.raises(NoLabels, match="none of 1 has one"):
        labelled_scans(Stored(), [1], SEGMENTATION)
    with pytest.raises(NoLabels, match="age"):
        labelled_scans(Stored(), [0, 1], CLASSIFICATION, "age", ("1", "2"))
    with pytest.raises(NoLabels, match="stage"):
        labelled_scans(Stored(), [1, 2], REGRESSION, "stage", ("0", "4"))


def test_a_class_out_of_range_is_said() -> None:
    with pytest.raises(ValueError, match=r"found 0, 1, 2\. .*label_values: {2: 1}"):
        task_of("segmentation").check_answers(some(["a", "b", "c"]).answers, 2)


def test_rows_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="as many answers"):
        LabelledScans(torch.zeros(2, 1, 1, 1, 1), torch.zeros(2).long(), ("a",), (0,))


def test_joined_sets_keep_their_rows() -> None:
    joined = join([some(["a"]), some(["b", "c"])])
    assert joined.patient == ("a", "b", "c")
    assert len(joined.answers) == 3


def test_declared_values_become_classes_and_all_others_background() -> None:
    local = LocalFinetuning(task="segmentation", classes=2, label_values={3: 1, 2: 1})
    found = labelled_scans(Stored(), [0, 2, 3], local)
    assert found.answers.flatten().tolist() == [0, 1, 1]
    chosen = LocalFinetuning(task="segmentation", classes=3, label_values={2: 2})
    assert labelled_scans(Stored(), [0, 2, 3], chosen).answers.flatten().tolist() == [0, 2, 0]


def test_declared_values_travel_as_json_and_stay_numbers() -> None:
    local = LocalFinetuning(task="segmentation", classes=2, label_values={255: 1})
    plan = FinetunePlan(run_sha256="0" * 64, pretrained_sha256="1" * 64, local=local)
    assert FinetunePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_values": {255: 2}}, "classes from 0 to 1"),
        ({"label_values": {2**15: 1}}, "int16"),
        ({"label_values": {1: 1}, "task": "classification"}, "no effect"),
    ],
)
def test_declared_values_that_cannot_be_meant_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalFinetuning(**{"task": "segmentation", "classes": 2, **change})
