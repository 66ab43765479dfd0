"""Estimators of the objective are unbiased; its gradients are right in bfloat16 and under vmap."""

import dataclasses
import math

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws
from meduet_models.objective.settings import ObjectiveConfig
from tests.meduet_models.objective.objective_case import ESTIMATORS, PATHS, Case


@PATHS
@pytest.mark.parametrize("restyled", [True, False])
def test_one_stream_is_unbiased_for_mftd(paths: str, restyled: bool) -> None:
    case = Case(paths, batch=4, restyled=restyled)
    full = case.losses().terms["mftd"]
    choices = []
    for code in range(16):
        show_lent = torch.tensor([bool(code >> bit & 1) for bit in range(4)])
        case.draws = dataclasses.replace(case.draws, show_lent=show_lent)
        choices.append(case.losses(estimator="one_stream").terms["mftd"])

    torch.testing.assert_close(torch.stack(choices).mean(), full, rtol=1e-4, atol=1e-5)
    assert torch.stack(choices).std() > 1e-3


@PATHS
def test_in_turn_the_expected_total_is_the_full_one(paths: str) -> None:
    case = Case(paths)
    full, totals, terms = case.losses(), [], {}
    for turn in ("mftd", "siqc"):
        case.draws = dataclasses.replace(case.draws, turn=turn)
        losses = case.losses(estimator="alternate")
        totals.append(losses.total)
        terms[turn] = set(losses.terms)

    torch.testing.assert_close(torch.stack(totals).mean(), full.total, rtol=1e-5, atol=1e-5)
    assert set(full.terms) - terms["mftd"] == {"siqc"} and set(full.terms) - terms["siqc"] == {"mftd"}


def test_before_the_warm_up_no_turn_is_taken() -> None:
    case = Case()
    case.draws = dataclasses.replace(case.draws, turn="mftd")
    torch.testing.assert_close(case.losses(0.1, estimator="alternate").total, case.losses(0.1).total)


@PATHS
def test_bf16_autocast_trains_in_float32_weights(paths: str) -> None:
    case = Case(paths)
    exact = case.losses()
    with torch.autocast("cpu", torch.bfloat16):
        rough = case.losses()
    rough.total.backward()

    assert rough.total.dtype == torch.float32
    assert math.isclose(float(rough.total.detach()), float(exact.total.detach()), rel_tol=0.05)
    assert all(parameter.grad.dtype == torch.float32 for parameter in case.student.parameters())


@PATHS
@ESTIMATORS
def test_gradients_of_groups_under_vmap_are_those_of_the_groups(paths: str, estimator: str) -> None:
    cases = [Case(paths, batch=4, seed=seed) for seed in range(3)]
    student, teacher = cases[0].student, cases[0].teacher
    objective = MeduetObjective(ObjectiveConfig(estimator=estimator))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, latents, restyled, site, partner, exchanged, show_lent):
            draws = StepDraws(partner, exchanged, show_lent, "mftd")
            return objective(self.student, teacher, StepBatch(latents, site, restyled), draws, 1.0).total

    step = Step()
    parameters = dict(step.named_parameters())

    def loss(parameters, *inputs):
        return functional_call(step, parameters, inputs)

    groups = [
        (
            c.batch.latents,
            c.batch.restyled,
            c.batch.site,
            c.draws.partner,
            c.draws.exchanged,
            c.draws.show_lent,
        )
        for c in cases
    ]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel on a CPU has no batching rule
        together = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0, 0, 0))(
            parameters, *(torch.stack(column) for column in zip(*groups, strict=True))
        )
    for row, group in enumerate(groups):
        alone = grad(loss)(parameters, *group)
        largest = max(value.abs().max() for value in alone.values())
        for name, value in alone.items():
            assert (together[name][row] - value).abs().max() < 1e-4 * largest, name
