import dataclasses
import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from client.latents.style_moments import body_parts, own_moments, survey
from federation.exchanges.survey import smallest_cohort, survey_layout
from federation.plan import (
    AggregationPlan,
    ReleasePlan,
    RunPlan,
    StylePlan,
    TrainingPlan,
    VolumePlan,
)
from meduet_models.meduet import NetworkConfig
from meduet_models.objective import ObjectiveConfig
from meduet_models.style.moments import CohortTooSmall, StyleMoments

PLAN = RunPlan(
    name="survey",
    seed=1,
    sites=("oslo", "lyon"),
    tokenizer_sha256="0" * 64,
    volumes=VolumePlan(modality="t1", shape=(16, 24, 16)),
    network=NetworkConfig(
        latent_channels=2,
        latent_grid=(4, 6, 4),
        patch_size=2,
        width=12,
        depth=1,
        heads=2,
        decoder_width=12,
        decoder_depth=1,
        decoder_heads=2,
    ),
    objective=ObjectiveConfig(),
    training=TrainingPlan(rounds=1, steps_per_round=1),
    style=StylePlan(minimum_cohort=5),
    aggregation=AggregationPlan(),
    release=ReleasePlan(),
)


def planned(**style: object) -> RunPlan:
    return dataclasses.replace(PLAN, style=dataclasses.replace(PLAN.style, **style))


class Scans:
    """A site's latents in memory: two scans of each patient; every fifth patient is for validation."""

    def __init__(self, num_patients: int, part: str = "head", seed: int = 0) -> None:
        self.patients = [f"patient {i // 2}" for i in range(2 * num_patients)]
        self.covariates: list[dict[str, str | float]] = [{"body_part": part} for _ in self.patients]
        generator = torch.Generator().manual_seed(seed)
        self.all = torch.randn(2 * num_patients, 2, 4, 6, 4, generator=generator)

    def indices(self, split: str) -> list[int]:
        validation = [i for i in range(len(self.all)) if i // 2 % 5 == 4]
        return validation if split == "validation" else sorted(set(range(len(self.all))) - set(validation))

    def latents(self, indices: Sequence[int]) -> Tensor:
        return self.all[list(indices)]


def test_a_survey_is_the_sum_over_training_patients() -> None:
    scans = Scans(10)
    rows = scans.indices("train")
    surveyed = survey(scans, PLAN)
    expected = StyleMoments.of(scans.all[rows], [scans.patients[i] for i in rows], survey_layout(PLAN))
    torch.testing.assert_close(surveyed.to_vector(), expected.to_vector())
    assert surveyed.sums["count"].tolist() == [8.0]


def test_patients_kept_for_validation_influence_nothing() -> None:
    scans, other = Scans(10), Scans(10)
    other.all[other.indices("validation")] += 100
    assert torch.equal(survey(scans, PLAN).to_vector(), survey(other, PLAN).to_vector())


@pytest.mark.parametrize(("num_patients", "site_minimum"), [(5, 0), (10, 9)])
def test_a_cohort_below_the_stricter_minimum_tells_nothing(num_patients: int, site_minimum: int) -> None:
    with pytest.raises(CohortTooSmall, match="Nothing is told"):
        survey(Scans(num_patients), PLAN, site_minimum)
    assert own_moments(Scans(num_patients), PLAN).entry().mean.shape == (2,)


def test_a_plan_that_asks_for_single_patients_does_not_get_them() -> None:
    assert smallest_cohort(planned(minimum_cohort=1)) == 2
    with pytest.raises(CohortTooSmall):
        survey(Scans(1), planned(minimum_cohort=1))


def test_a_body_part_with_too_few_patients_is_withheld() -> None:
    plan = planned(body_parts=("head", "chest"))
    scans = Scans(10)
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
        body_parts(Scans(3, part="foot"), plan)
    assert "patient 0" not in str(error.value)
    assert body_parts(Scans(3, part="foot"), PLAN).tolist() == [0] * 6


def test_statistics_that_had_to_be_scaled_down_are_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    scans = Scans(10)
    scans.all[0] *= 100
    with caplog.at_level(logging.WARNING):
        survey(scans, PLAN)
    assert "1 of 8 patients" in caplog.text
    caplog.clear()
    survey(Scans(10), PLAN)
    assert caplog.text == ""


def test_crops_that_are_not_registered_tell_no_maps() -> None:
    plan = dataclasses.replace(PLAN, volumes=dataclasses.replace(PLAN.volumes, registered=False))
    assert set(survey(Scans(10), plan).sums) == {"count", "mean", "mean_square", "variance"}
    assert "amplitude" in survey(Scans(10), planned(exchange="amplitude")).sums
