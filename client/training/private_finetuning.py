"""Noisy steps of a fine-tuning: one round at one site, with differential privacy for each patient (DP-SGD).

A step draws each patient by herself from the round's secret, and one labelled scan of hers; the gradient of
that scan's own loss is cut over all trained weights together, the cut gradients are added up and get noise,
and the sum, divided by the plan's numbers, goes to the optimiser. A step of nobody takes its noise as any
other. AdamW's moments and the moving average are functions of noisy sums. A round that was killed begins
again with the same draws and noise: they follow from the key of its place in the ledger.

Does not do: tell losses, norms or who was in a step, to anybody; choose scans
(`client/latents/labelled.py`); bound or send the update (`client/release.py`).
Source: DP-SGD (arXiv:1607.00133); gradients per sample by Opacus (`privacy/sample_gradients.py`).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from client.latents.labelled import LabelledScans
from client.scans.patients import rows_by_patient
from client.training.finetuning import MovingAverage, check_answers, learning_rate_at
from federation.exchanges.finetuning import FinetunePlan
from federation.plan.finetuning_privacy import protection_of
from meduet_models.adamw import AdamW, decay_groups
from meduet_models.downstream.starting import StartedNetwork
from meduet_models.downstream.task import Task
from meduet_models.downstream.tasks import task_of
from privacy.group_gradients import ClippedSum, clipped_sum
from privacy.sample_gradients import per_sample_gradients
from privacy.step_secrets import StepSecrets


def finetune_privately(
    network: StartedNetwork,
    scans: LabelledScans | None,
    finetuning: FinetunePlan,
    round_number: int,
    noise: StepSecrets,
    *,
    crop_foreground: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train `network` for the plan's noisy steps of a round, in place; None: there is nobody to learn from.

    `on_step` is called after each step with its number (from 1) and NaN: its loss is nobody's to see.

    Guarantee: adding or removing one patient with all her scans changes the sum of a step by at most the
    plan's `clip_norm` in L2, before noise of the promise's deviation; she is in a step with the plan's
    chance. The weights after it are a function of these sums and of what is public. Not covered: how long a
    step took.
    """
    local, privacy = finetuning.local, protection_of(finetuning)
    network.train()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimiser = AdamW(decay_groups(list(trained.values()), local.weight_decay), lr=local.learning_rate)
    averaged = MovingAverage(network, local.average)
    first, total = (round_number - 1) * local.steps, finetuning.rounds * local.steps
    expected = privacy.sampling_rate * privacy.expected_patients
    for step in range(local.steps):
        summed = step_sum(network, scans, finetuning, noise, step, crop_foreground)
        noise.into_gradients(step, summed, trained, expected)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(first + step, total, local)
        optimiser.step()
        averaged.update(step)
        on_step(step + 1, math.nan)
    averaged.keep()


def step_sum(
    network: StartedNetwork,
    scans: LabelledScans | None,
    finetuning: FinetunePlan,
    noise: StepSecrets,
    step: int,
    crop_foreground: float,
) -> dict[str, Tensor]:
    """The sum of the cut gradients of those who are in a step, by parameter, float64; zeros for nobody. As
    many at once as the plan's batch holds scans."""
    local, privacy = finetuning.local, protection_of(finetuning)
    task, device = task_of(local.task), next(network.parameters()).device
    whole = ClippedSum.of_none({name: p for name, p in network.named_parameters() if p.requires_grad})
    drawn = _drawn(scans, noise, step, privacy.sampling_rate, crop_foreground)
    for at in range(0, len(drawn), local.batch_size):
        latents, truth = (torch.cat(part) for part in zip(*drawn[at : at + local.batch_size], strict=True))
        seen, answers = latents.to(device), truth.to(device)
        mean_loss = partial(_mean_loss, network, task, seen, answers)
        gradients = per_sample_gradients(task, network, mean_loss, len(seen))
        whole = whole + clipped_sum(gradients, privacy.clip_norm)
    return whole.total


def _mean_loss(network: StartedNetwork, task: Task, seen: Tensor, answers: Tensor) -> Tensor:
    return task.loss(network(seen), answers)


def _drawn(
    scans: LabelledScans | None, noise: StepSecrets, step: int, rate: float, crop_foreground: float
) -> list[tuple[Tensor, Tensor]]:
    """One scan of each patient who is in the step, with its answer; of a whole scan a crop."""
    drawn: list[tuple[Tensor, Tensor]] = []
    if scans is None:
        return drawn
    for patient, own in rows_by_patient(scans.patient, range(len(scans))).items():
        if (generator := noise.drawn(step, patient, rate)) is not None:
            row = own[int(torch.randint(len(own), (), generator=generator))]
            drawn.append(scans.drawn([row], crop_foreground, generator))
    return drawn


def answerable(task: Task, scans: LabelledScans, classes: int) -> LabelledScans | None:
    """The scans whose answer an output stands for; None where there is none. With privacy one patient's
    label refuses no round: that would tell of her."""
    fit = []
    for row in range(len(scans)):
        try:
            check_answers(task, scans.rows([row]), classes)
        except ValueError:
            continue
        fit.append(row)
    return scans.rows(fit) if fit else None
