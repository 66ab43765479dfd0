"""How a plan's steps of pretraining are taken, at a site and at the centre: the optimiser, its learning rate,
and the descent of one loss.

Does not do: losses (`client/training/pretraining.py`; with privacy `server/phantom_training.py`), or noise
(`client/training/private.py`).
Source: MeDUET (arXiv:2602.17901), section "Implementation"; Muon (`meduet_models/muon.py`) is not MeDUET's.
"""

import math

import torch
from torch import Tensor

from federation.plan.plan import RunPlan
from meduet_models.adamw import AdamW, decay_groups
from meduet_models.meduet import MeDUET
from meduet_models.muon import Muon
from meduet_models.objective.teacher import Teacher, momentum_at
from meduet_models.schedules import cosine, rise


class NotFinite(ValueError):
    """The loss or its gradient is NaN or infinite; the weights were not touched."""


def optimiser_of(student: MeDUET, plan: RunPlan) -> AdamW:
    """The plan's optimiser over all of the student's parameters."""
    training = plan.training
    rate, decay, betas = training.learning_rate, training.weight_decay, training.betas
    if training.optimiser == "muon":
        return Muon.of(student, lr=rate, betas=betas, weight_decay=decay)
    return AdamW(decay_groups(student.parameters(), decay), lr=rate, betas=betas, fused=True)


def learning_rate_at(number: int, plan: RunPlan) -> float:
    """Learning rate of step `number` of the run (from 0): a straight rise, then a cosine to the final
    rate."""
    training, total = plan.training, plan.total_steps
    rising = round(training.warmup * total)
    if number < rising:
        return rise(number, rising, training.learning_rate)
    share = (number - rising) / max(1, total - 1 - rising)
    return cosine(training.learning_rate, training.final_learning_rate, share)


def descend(
    loss: Tensor, student: MeDUET, teacher: Teacher, optimiser: AdamW, plan: RunPlan, number: int
) -> tuple[float, Tensor]:
    """Step `number` of the run (from 0) down the gradient of `loss`, and the teacher after it; the loss, and
    the gradient's norm before it is clipped.

    Raises `NotFinite` before the weights are touched.
    """
    training = plan.training
    value = _finite(loss, "loss", number)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), training.gradient_clip_norm)
    _finite(norm, "gradient", number)
    momentum = momentum_at(number / plan.total_steps, *training.teacher_momentum)
    take_step(student, teacher, optimiser, learning_rate_at(number, plan), momentum)
    return value, norm


def take_step(
    student: MeDUET, teacher: Teacher, optimiser: AdamW, learning_rate: float, momentum: float
) -> None:
    """One step along the gradients that the student's parameters hold, and the teacher after it."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad()  # here, so that no gradient is held through a forward pass or a write
    teacher.update(student, momentum)


def _finite(value: Tensor, what: str, number: int) -> float:
    if not math.isfinite(number_of := float(value.detach())):
        raise NotFinite(
            f"Expected a finite {what} at step {number} of the run; got {number_of}. The weights are "
            "untouched; lower training.learning_rate, or look for a scan with values out of range."
        )
    return number_of
