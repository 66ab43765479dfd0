"""Masked steps first: the early steps of a run hide tokens and ask for them; all terms come after."""

import dataclasses

import pytest
import torch

from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from tests.meduet_models.objective.objective_case import ESTIMATORS, NOTHING, PATHS, Case, reconstruction_only


@PATHS
@ESTIMATORS
def test_the_first_share_of_steps_is_masked_and_the_others_are_what_they_were(
    paths: str, estimator: str
) -> None:
    case = Case(paths)
    early = case.losses(0.59, masked_share=0.6, estimator=estimator)
    masked = case.losses(0.59, reconstruction_only(visible_reconstruction=1.0), masking="masked")
    assert early.terms.keys() == masked.terms.keys()
    assert torch.equal(early.total, masked.total)
    late = case.losses(0.8, masked_share=0.6, mftd_warmup=0.4, estimator=estimator)
    whole = case.losses(0.5, mftd_warmup=0.4, estimator=estimator)  # .8 is half of what is left after .6
    torch.testing.assert_close(late.total, whole.total)
    assert late.terms.keys() == whole.terms.keys()


def test_warm_ups_count_from_the_end_of_the_masked_steps() -> None:
    case = Case()
    assert "mftd" not in case.losses(0.79, masked_share=0.6, mftd_warmup=0.5).terms
    assert "mftd" in case.losses(0.81, masked_share=0.6, mftd_warmup=0.5).terms


def test_a_masked_step_leaves_classifiers_and_teacher_out() -> None:
    case = Case()
    case.losses(0.0, masked_share=0.5).total.backward()
    without = {n for n, p in case.student.named_parameters() if p.grad is None}
    assert without == {n for n, _ in case.student.named_parameters() if n.startswith("site_from")}


def test_a_run_that_will_need_restyled_scans_says_so_at_its_first_step() -> None:
    case = Case(restyled=False)
    with pytest.raises(ValueError, match=r"Expected batch\.restyled"):
        case.losses(0.0, LossWeights(), masked_share=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masked_share": 1.0}, "objective.masked_share"),
        ({"masked_share": -0.1}, "objective.masked_share"),
        (
            {
                "masked_share": 0.5,
                "masking": "masked",
                "weights": dataclasses.replace(NOTHING, reconstruction=1.0),
            },
            "has no effect with objective.masking=masked",
        ),
        (
            {"masked_share": 0.5, "weights": dataclasses.replace(NOTHING, siqc=0.3)},
            "trains on reconstruction alone",
        ),
    ],
)
def test_masked_shares_that_cannot_act_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)
