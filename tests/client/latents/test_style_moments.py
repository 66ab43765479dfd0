import dataclasses
import logging

import pytest
import torch

from client.latents.style_moments import body_parts, own_moments, survey
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan.plan import (
    RunPlan,
    TrainingPlan,
)
from meduet_models.style.moments import CohortTooSmall, StyleMoments
from tests.worlds import ViewedScans, small_plan

PLAN = small_plan(
    name="survey",
    sites=("oslo", "lyon"),
    training=TrainingPlan(rounds=1, steps_per_round=1),
)


def planned(**style: object) -> RunPlan:
    return dataclasses.replace(PLAN, style=dataclasses.replace(PLAN.style, **style))


def scans_of(num_patients: int, part: str = "head", seed: int = 0) -> ViewedScans:
    """Two scans of each patient; every fifth patient is not for training."""
    scans = ViewedScans.of([f"patient {i // 2}" for i in range(2 * num_patients)], seed=seed)
    scans.train = [i for i in range(2 * num_patients) if i // 2 % 5 != 4]
    scans.covariates = [{"body_part": part} for _ in scans.patients]
    return scans


def test_a_survey_is_the_sum_over_training_patients() -> None:
    scans = scans_of(10)
    rows = scans.indices("train")
    surveyed = survey(scans, PLAN)
    patients = [scans.patients[i] for i in rows]
    expected = StyleMoments.of(scans.values[rows, 0], patients, survey_layout(PLAN))
    torch.testing.assert_close(surveyed.to_vector(), expected.to_vector())
    assert surveyed.sums["count"].tolist() == [8.0]


def test_patients_kept_for_validation_influence_nothing() -> None:
    scans, other = scans_of(10), scans_of(10)
    other.values[:, 0][other.indices("validation")] += 100
    assert torch.equal(survey(scans, PLAN).to_vector(), survey(other, PLAN).to_vector())


@pytest.mark.parametrize(("num_patients", "site_minimum"), [(5, 0), (10, 9)])
def test_a_cohort_below_the_stricter_minimum_tells_nothing(num_patients: int, site_minimum: int) -> None:
    with pytest.raises(CohortTooSmall, match="Nothing is told"):
        survey(scans_of(num_patients), PLAN, site_minimum)
    assert own_moments(scans_of(num_patients), PLAN).entry().mean.shape == (2,)


def test_a_plan_that_asks_for_single_patients_does_not_get_them() -> None:
    assert smallest_cohort(planned(minimum_cohort=1)) == 2
    with pytest.raises(CohortTooSmall):
        survey(scans_of(1), planned(minimum_cohort=1))


def test_a_body_part_with_too_few_patients_is_withheld() -> None:
    plan = planned(body_parts=("head", "chest"))
    scans = scans_of(10)
    for row in (0, 1, 2, 3):
        scans.covariates[row]["body_part"] = "chest"
    assert own_moments(scans, plan).sums["count"].tolist() == [6.0, 2.0]
    surveyed = survey(scans, plan)
    assert surveyed.sums["count"].tolist() == [6.0, 0.0]
    assert not any(bool(total[1].any()) for total in surveyed.sums.values())
    assert bool(surveyed.sums["mean"][0].any())


def test_a_scan_of_an_unknown_body_part_is_named_by_its_part_and_not_by_its_patient() -> None:
    plan = planned(body_parts=("head", "chest"))
    with pytest.raises(ValueError, match="foot") as error:
        body_parts(scans_of(3, part="foot"), plan)
    assert "patient 0" not in str(error.value)
    assert body_parts(scans_of(3, part="foot"), PLAN).tolist() == [0] * 6


def test_statistics_that_had_to_be_scaled_down_are_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    scans = scans_of(10)
    scans.values[:, 0][0] *= 100
    with caplog.at_level(logging.WARNING):
        survey(scans, PLAN)
    assert "1 of 8 patients" in caplog.text
    caplog.clear()
    survey(scans_of(10), PLAN)
    assert caplog.text == ""


def test_crops_that_are_not_registered_tell_no_maps() -> None:
    plan = dataclasses.replace(PLAN, volumes=dataclasses.replace(PLAN.volumes, registered=False))
    assert set(survey(scans_of(10), plan).sums) == {"count", "mean", "mean_square", "variance"}
    assert "amplitude" in survey(scans_of(10), planned(exchange="amplitude")).sums
