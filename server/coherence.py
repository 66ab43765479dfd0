"""How far the gradients of groups point one way, measured on public scans: no patient is in it.

What this file does not do: say what it is worth (`privacy/worth.py`).

Axes: m = public scans, g = groups.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.private_rounds import noisy_of, resting_others
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import MeduetObjective, StepBatch, draw_step
from meduet_models.objective.teacher import Teacher
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.restyling import own_entries, restyle_each
from privacy.group_gradients import ClippedSum, GroupGradients, clipped_sum

GROUPS = 32
"""Groups that are looked at, one by one."""


def coherence_of(
    student: MeDUET, plan: RunPlan, public: Float[Tensor, "m c d h w"], style_bank: StyleBank
) -> float:
    """Length of the mean of cut group gradients over `clip_norm`, from 0 to 1, without what chance adds to
    it in so few groups."""
    noisy, trained = noisy_of(plan), resting_others(plan, student)
    teacher, size = Teacher(student), noisy.group_size
    present = tuple(style_bank.sites.index(site) for site in style_bank.present)
    draws = generator_of("coherence", plan.seed)
    total = ClippedSum.of_none(trained)
    squares = 0.0
    for _ in range(GROUPS):
        rows = torch.randperm(len(public), generator=draws)[:size]
        step = draw_step(draws, size, plan.network.num_tokens, plan.objective, present, size)
        assert step.target_site is not None, "a bank has a style"
        latents, site = public[rows], step.target_site
        own, swapped = own_entries(latents, survey_layout(plan)), site[step.partner]
        batch = StepBatch(
            latents=restyle_each(latents, own, style_bank, site),
            site=site,
            restyled=restyle_each(latents, own, style_bank, swapped),
            restyled_site=swapped,
            subject=rows,
        )
        with GroupGradients(student, tuple(trained), 1, size) as watched:
            losses = MeduetObjective(plan.objective)(student, teacher, batch, step, 1.0, size)
            losses.total.backward()  # type: ignore[no-untyped-call]
        one = clipped_sum(watched.gradients(), noisy.clip_norm)
        squares += sum(float(tensor.square().sum()) for tensor in one.total.values())
        total = total + one
    whole = sum(float(tensor.square().sum()) for tensor in total.total.values())
    between_groups = (whole - squares) / (GROUPS * (GROUPS - 1))  # mean product of two different groups
    return float(max(0.0, between_groups) ** 0.5 / noisy.clip_norm)
