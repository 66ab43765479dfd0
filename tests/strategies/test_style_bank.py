import dataclasses

import pytest
import torch
from torch import Tensor

from federation.exchanges.survey import survey_layout
from federation.plan.plan import (
    StylePlan,
    TrainingPlan,
)
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.style.moments import CohortTooSmall, StyleMoments
from strategies.style_bank import StyleSurvey
from tests.worlds import small_plan

PLAN = small_plan(
    name="survey",
    objective=ObjectiveConfig(weights=LossWeights(invariance=0.0, restyled_reconstruction=0.0)),
    training=TrainingPlan(rounds=1, steps_per_round=1),
    style=StylePlan(minimum_cohort=5, centre="full"),
)
LAYOUT = survey_layout(PLAN)


def moments_of(seed: int, num_patients: int = 6) -> dict[str, Tensor]:
    x = torch.randn(num_patients, 2, 4, 6, 4, generator=torch.Generator().manual_seed(seed)) + seed
    return StyleMoments.of(x, [str(i) for i in range(num_patients)], LAYOUT).to_tensors()


def test_the_bank_is_the_same_whatever_the_order_of_replies_and_retries() -> None:
    forward, backward = StyleSurvey(PLAN), StyleSurvey(PLAN)
    for site, seed in (("oslo", 0), ("lyon", 1), ("turin", 2)):
        assert forward.add(site, moments_of(seed))
    for site, seed in (("turin", 2), ("lyon", 1), ("turin", 2), ("oslo", 0), ("oslo", 0)):
        assert backward.add(site, moments_of(seed))
    one, other = forward.bank().to_tensors(), backward.bank().to_tensors()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["count"].tolist() == [[6.0], [6.0], [6.0]]


def test_a_site_keeps_its_place_in_the_bank_when_another_is_missing() -> None:
    survey = StyleSurvey(PLAN)
    survey.add("turin", moments_of(2))
    entry = StyleMoments.from_tensors(moments_of(2), LAYOUT).entry()
    bank = survey.bank()
    assert bank.present == survey.answered == ("turin",)
    torch.testing.assert_close(bank.entry(torch.tensor([2])).mean[0], entry.mean)


def wrong(name: str, change: float) -> dict[str, Tensor]:
    tensors = moments_of(1)
    return tensors | {name: tensors[name] + change}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (moments_of(1, 4), "at least 5 patients"),
        (moments_of(1) | {"count": torch.zeros(1)}, "at least 5 patients"),
        (wrong("count", 0.5), "whole patients"),
        (wrong("map", float("nan")), "finite"),
        (wrong("variance", -1e3), "at least 0"),
        (wrong("centre", 1e3), "has not bounded them"),
        ({k: v for k, v in moments_of(1).items() if k != "centre"}, "'centre'"),
        (moments_of(1) | {"mean": torch.zeros(1, 5)}, "'mean'"),
    ],
)
def test_sums_that_no_honest_cohort_told_are_refused_with_their_reason(
    tensors: dict[str, Tensor], reason: str
) -> None:
    survey = StyleSurvey(PLAN)
    survey.add("oslo", moments_of(0))
    assert not survey.add("lyon", tensors)
    assert reason in survey.refused["lyon"]
    assert survey.bank().present == ("oslo",)
    assert survey.add("lyon", moments_of(1)) and not survey.refused


def test_a_site_that_tells_other_sums_later_is_refused_and_the_first_stay() -> None:
    survey = StyleSurvey(PLAN)
    survey.add("oslo", moments_of(0))
    before = survey.bank().to_tensors()
    assert not survey.add("oslo", moments_of(5))
    assert "The first stay" in survey.refused["oslo"]
    after = survey.bank().to_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_stranger_is_refused_and_nobody_makes_no_bank() -> None:
    survey = StyleSurvey(PLAN)
    assert not survey.add("paris", moments_of(0))
    with pytest.raises(CohortTooSmall):
        survey.bank()


def test_sums_said_about_a_body_part_without_patients_are_refused() -> None:
    plan = dataclasses.replace(PLAN, style=dataclasses.replace(PLAN.style, body_parts=("head", "chest")))
    layout = survey_layout(plan)
    x = torch.randn(6, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    tensors = StyleMoments.of(x, [str(i) for i in range(6)], layout).to_tensors()
    assert StyleSurvey(plan).add("oslo", tensors)
    tensors["mean"][1] = 1.0
    survey = StyleSurvey(plan)
    assert not survey.add("oslo", tensors) and "without patients" in survey.refused["oslo"]


def test_without_exchange_the_pooled_scale_goes_out_and_no_sites_style() -> None:
    plan = dataclasses.replace(PLAN, style=dataclasses.replace(PLAN.style, exchange="none"))
    survey, open_survey = StyleSurvey(plan), StyleSurvey(PLAN)
    for site, seed in (("oslo", 0), ("lyon", 1)):
        assert survey.add(site, moments_of(seed)) and open_survey.add(site, moments_of(seed))
    silent, bank = survey.bank(), open_survey.bank()
    assert silent.present == () and not bool(silent.entries.mean.any())
    assert torch.equal(silent.centre, bank.centre) and torch.equal(silent.scale, bank.scale)
