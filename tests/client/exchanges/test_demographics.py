"""Ages and sexes leave in whole cohorts only; exact counts would tell whether one more patient is there."""

import random
from typing import Any

import pytest
import torch

from client.commands.plan_words import plan_words
from client.scans.tables import Covariates
from federation.exchanges.demographics import (
    AGES,
    DEMOGRAPHICS,
    SEXES,
    age_bands,
    counted,
    demographics_shapes,
)
from federation.plan.plan import DemographicsPlan, RunPlan
from federation.published_plan import PublishedPlan
from privacy.whole_cohorts import in_whole_cohorts
from server.exchanges.demographics import check_counts
from strategies.aggregation import ReplyRefused
from tests.worlds import small_plan

EDGES = (20.0, 40.0, 60.0)
LEAST = 5


def plan(**changes: Any) -> RunPlan:
    return small_plan(demographics=DemographicsPlan(age_edges=EDGES), **changes)


def people(rng: random.Random, number: int) -> list[Covariates]:
    return [{"age": rng.uniform(0, 90), "sex": rng.choice("FM")} for _ in range(number)]


def test_each_patient_is_counted_once_as_an_age_and_once_as_a_sex() -> None:
    patients: list[Covariates] = [
        {"age": 19.9, "sex": "F"}, {"age": 20.0, "sex": "M"}, {"age": 60.0},
        {"age": "n/a", "sex": "other"}, {},
    ]  # fmt: skip
    found = counted(patients, EDGES)
    assert age_bands(EDGES) == ("under 20", "20 to 40", "40 to 60", "60 and over", "not known")
    assert found[AGES].tolist() == [1, 1, 0, 1, 2] and found[SEXES].tolist() == [1, 1, 3]
    assert {name: tuple(t.shape) for name, t in found.items()} == demographics_shapes(plan())
    for one in patients:
        alone = counted([one], EDGES)
        length = torch.cat([alone[AGES], alone[SEXES]]).norm()
        assert float(length) <= DEMOGRAPHICS.promise(plan(), None).bound * (1 + 1e-12)  # type: ignore[arg-type]


def test_a_band_below_the_minimum_cohort_is_told_as_empty_and_no_count_is_exact_by_intent() -> None:
    counts = torch.tensor([0.0, 4.0, 5.0, 9.0, 10.0], dtype=torch.float64)
    assert in_whole_cohorts(counts, LEAST).tolist() == [0, 0, 5, 5, 10]


def shows(exact: bool, draws: int = 2000) -> float:
    """How often somebody who knows every other patient sees in what is told that one more is there."""
    rng, seen = random.Random(0), 0
    for _ in range(draws):
        others, one = people(rng, rng.randint(20, 60)), people(rng, 1)
        without, with_one = counted(others, EDGES), counted(others + one, EDGES)
        if not exact:
            without, with_one = (
                {n: in_whole_cohorts(t, LEAST) for n, t in c.items()} for c in (without, with_one)
            )
        seen += not torch.equal(without[AGES], with_one[AGES])
    return seen / draws


def test_who_knows_all_others_sees_one_more_in_exact_counts_always_and_in_whole_cohorts_seldom() -> None:
    assert shows(exact=True) == 1.0
    assert abs(shows(exact=False) - 1 / LEAST) < 0.04  # 2000 draws: 4.5 deviations


@pytest.mark.parametrize("wrong", [3.0, 7.5, -5.0, float("nan"), float(1 << 21)])
def test_counts_that_no_site_may_tell_are_put_aside(wrong: float) -> None:
    shapes = demographics_shapes(plan())
    good = {name: torch.full(shape, 5.0, dtype=torch.float64) for name, shape in shapes.items()}
    check_counts(good, plan())
    good[AGES][1] = wrong
    with pytest.raises(ReplyRefused):
        check_counts(good, plan())
    with pytest.raises(ReplyRefused, match="other tensors"):
        check_counts({AGES: good[SEXES]}, plan())


def test_no_plan_asks_unless_it_says_so_and_none_with_noise_may() -> None:
    assert not DEMOGRAPHICS.rounds(small_plan()) and list(DEMOGRAPHICS.rounds(plan())) == [0]
    with pytest.raises(ValueError, match="ascend"):
        small_plan(demographics=DemographicsPlan(age_edges=(60.0, 20.0)))


def test_the_hospital_reads_what_it_would_tell_and_how_often() -> None:
    asked = PublishedPlan(plan=plan(), bundle_sha256="0" * 64)
    text = " ".join(words for _, words in plan_words(asked, site_minimum=7))
    assert "under 20, 20 to 40, 40 to 60, 60 and over, not known" in text
    assert "rounded down to whole cohorts of 7" in text and "ages and sexes: 1" in text
    unasked = PublishedPlan(plan=small_plan(), bundle_sha256="0" * 64)
    assert "model card" not in " ".join(words for _, words in plan_words(unasked))
