"""Groups of a batch do not meet: each has the loss that it has alone, and the batch the mean of these."""

import dataclasses

import pytest
import torch

from meduet_models.objective.contrast import by_group
from meduet_models.objective.objective import Losses, MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from tests.meduet_models.objective.objective_case import ESTIMATORS, PATHS, PUBLISHED, SITES, TINY, Case

GROUPS, SIZE = 3, 4


def grouped_case(paths: str = "split", restyled: bool = True) -> Case:
    case = Case(paths, batch=GROUPS * SIZE, restyled=restyled)
    generator = torch.Generator().manual_seed(5)
    case.draws = draw_step(generator, GROUPS * SIZE, TINY.num_tokens, ObjectiveConfig(), SITES, SIZE)
    return case


def objective_of(batch: StepBatch, **config: object) -> MeduetObjective:
    weights = PUBLISHED if batch.restyled is None else LossWeights()
    return MeduetObjective(ObjectiveConfig(weights=weights, **config))


def losses(case: Case, progress: float = 1.0, **config: object) -> Losses:
    objective = objective_of(case.batch, **config)
    return objective(case.student, case.teacher, case.batch, case.draws, progress, SIZE)


def alone(case: Case, group: int) -> tuple[StepBatch, StepDraws]:
    """One group, as if nobody else were there."""
    rows = slice(group * SIZE, (group + 1) * SIZE)
    batch, draws = case.batch, case.draws
    assert draws.target_site is not None
    return StepBatch(
        batch.latents[rows], batch.site[rows], None if batch.restyled is None else batch.restyled[rows]
    ), StepDraws(
        draws.partner[rows] - group * SIZE,
        draws.exchanged[rows],
        draws.show_lent[rows],
        draws.turn,
        draws.target_site[rows],
    )


@PATHS
@ESTIMATORS
@pytest.mark.parametrize("restyled", [True, False])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_every_term_is_the_mean_over_groups_of_their_own(
    paths: str, estimator: str, restyled: bool, progress: float
) -> None:
    case = grouped_case(paths, restyled)
    together = losses(case, progress, estimator=estimator, masked_share=0.5)
    objective = objective_of(case.batch, estimator=estimator, masked_share=0.5)
    each = [objective(case.student, case.teacher, *alone(case, k), progress) for k in range(GROUPS)]
    for name, term in together.terms.items():
        torch.testing.assert_close(term, torch.stack([e.terms[name] for e in each]).mean())
    torch.testing.assert_close(together.total, torch.stack([e.total for e in each]).mean())


def test_without_groups_scans_of_other_groups_are_negatives() -> None:
    """The loss that must differ: contrasts over the whole batch."""
    case = grouped_case()
    objective = objective_of(case.batch)
    whole = objective(case.student, case.teacher, case.batch, case.draws, 1.0)
    for name in ("siqc", "invariance"):
        assert whole.terms[name].item() > 1.1 * losses(case).terms[name].item()


@PATHS
@pytest.mark.parametrize("restyled", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_what_is_in_one_group_reaches_no_scan_of_another(paths: str, restyled: bool, poison: float) -> None:
    def at_the_scans(case: Case, size: int | None = SIZE) -> torch.Tensor:
        case.student.requires_grad_(False)
        scans = case.batch.latents.clone().requires_grad_()
        batch = dataclasses.replace(case.batch, latents=scans)
        total = objective_of(batch)(case.student, case.teacher, batch, case.draws, 1.0, size).total
        (gradient,) = torch.autograd.grad(total, scans)
        return gradient[:-SIZE]

    case, other = grouped_case(paths, restyled), grouped_case(paths, restyled)
    spoilt = torch.cat(
        [other.batch.latents[:-SIZE], torch.full((SIZE, *other.batch.latents.shape[1:]), poison)]
    )
    other.batch = dataclasses.replace(other.batch, latents=spoilt)
    clean, beside = at_the_scans(case), at_the_scans(other)

    assert bool(clean.isfinite().all())
    assert torch.equal(clean, beside)
    assert not torch.equal(at_the_scans(case, None), at_the_scans(other, None))  # without groups it does


def test_a_step_is_drawn_inside_groups() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        draws = draw_step(generator, 18, 16, ObjectiveConfig(), (0, 2), 6)
        place = torch.arange(18)
        assert torch.equal(draws.partner // 6, place // 6)
        assert torch.equal(draws.partner[draws.partner], place) and bool((draws.partner != place).all())
        assert torch.equal(draws.exchanged, draws.exchanged[draws.partner])


def test_rows_of_a_group_stay_in_the_order_of_their_streams() -> None:
    scan = torch.arange(6)
    stacked = torch.cat([scan, scan + 100])
    assert by_group(stacked, 2, 2).tolist() == [[0, 1, 100, 101], [2, 3, 102, 103], [4, 5, 104, 105]]
    assert by_group(stacked, None, 2) is stacked


def test_a_batch_that_is_not_whole_groups_and_partners_across_are_refused() -> None:
    case = grouped_case()
    objective = objective_of(case.batch)
    for size in (1, 3, 5, 8):
        with pytest.raises(ValueError, match="whole groups of an even group_size"):
            objective(case.student, case.teacher, case.batch, case.draws, 1.0, size)
    with pytest.raises(ValueError, match="partners inside each group"):
        objective(case.student, case.teacher, case.batch, case.draws, 1.0, 2)
    for batch, size in ((10, 4), (10, 5), (4, 0)):
        with pytest.raises(ValueError, match="Expected"):
            draw_step(torch.Generator(), batch, 16, ObjectiveConfig(), SITES, size)
