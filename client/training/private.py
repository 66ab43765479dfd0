"""Noisy steps: one round at one site, with differential privacy for each patient (group DP-SGD).

A step takes the groups that were drawn (`client/latents/group_batches.py`), cuts the gradient of each over
all weights together, adds them up, adds noise, divides by the number of groups that the patients of the
site's style code make times their chance, and hands that to the optimiser. An empty step takes its noise as
any other. What follows (moments, teacher, weights at home) is a function of noisy sums and of what is public,
so it may be kept and shown. At level `adapters` all but the output layer rests, at `full` what is in no
linear layer and no layer norm. The step size is `training.final_learning_rate`: these steps begin where the
schedule has ended.

A round that was cut short goes on after the last step that was written, with the same draws and noise; where
the key of its draws was lost, it begins anew: nothing of it had left.

Does not do: tell losses, norms or who was in a step, to anybody; bound or send the update
(`client/release.py`).
Source: DP-SGD (arXiv:1607.00133); groups as units: docs/architecture.md, decision 5.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from client.latents.group_batches import Group, GroupBatches
from client.training.site_state import RoundResult, UnderWay
from client.training.trainee import Trainee
from federation.exchanges.private_rounds import noisy_of, resting_others, trained_keys
from federation.plan.optimisation import take_step
from federation.plan.plan import RunPlan
from federation.summed_noise import summed_factor
from meduet_models.objective.objective import MeduetObjective
from meduet_models.weights import StoredWeights
from privacy.group_gradients import ClippedSum, GroupGradients, clipped_sum
from privacy.step_secrets import StepSecrets

_TRAINEE = "trainee/"
_Turn = Literal["mftd", "siqc"]


@runtime_checkable
class Beside(Protocol):
    """Who is in a step beside its patients (`client/training/canaries.py`)."""

    def step_sum(self, trainee: Trainee, noise: StepSecrets, step: int, turn: _Turn) -> Mapping[str, Tensor]:
        """What they add to the sum of a step, by parameter, float64: a function of nobody's scan."""


def train_privately(
    trainee: Trainee,
    batches: GroupBatches,
    plan: RunPlan,
    round_number: int,
    noise: StepSecrets,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    under_way: UnderWay | None = None,
    canaries: Beside | None = None,
) -> RoundResult:
    """Take the plan's noisy steps of a round and give back what changed in the weights that travel.

    `on_step` is called after each step with its number (from 1) and NaN: its loss is nobody's to see.
    `canaries`: who is in each step beside the patients; added to their sum, which is what it was.

    Guarantee: adding or removing one patient changes the sum of a step by at most the plan's `clip_norm` in
    L2, before noise of the promise's deviation; she is in a step with the plan's chance. With `partners:
    private` replacing one patient changes it by at most twice that. The result is a function of these sums
    and of what is public. Not covered: how long a step took; then also how many patients there are.
    """
    student, noisy = trainee.student, noisy_of(plan)
    trained = resting_others(plan, trainee.student)

    def load(tensors: StoredWeights) -> None:
        trainee.load(tensors.part(_TRAINEE))

    def changed() -> dict[str, Tensor]:
        return {f"{_TRAINEE}{name}": tensor for name, tensor in trainee.tensors().items()}

    done, spent = (0, 0.0) if under_way is None else under_way.resume(load)
    noise.go_on(done)
    began = time.perf_counter() - spent
    for step in range(done, noisy.steps_per_round):
        turn = batches.turn(round_number, step)
        total = step_sum(trainee, batches, batches.drawn(noise, step), turn, plan)
        if canaries is not None:
            added = canaries.step_sum(trainee, noise, step, turn)
            total = {name: summed + added[name] for name, summed in total.items()}
        noise.into_gradients(step, total, trained, batches.expected)
        take_step(
            student,
            trainee.teacher,
            trainee.optimiser,
            plan.training.final_learning_rate,
            plan.training.teacher_momentum[1],
        )
        if under_way is not None:
            under_way.offer(step + 1, time.perf_counter() - began, changed)
        on_step(step + 1, math.nan)

    weights = student.state_dict()
    return RoundResult(
        update={
            name: tensor.cpu() - trainee.shared[name].to(tensor.dtype)
            for name, tensor in weights.items()
            if name in trainee.shared
        },
        metrics={
            "steps": float(noisy.steps_per_round),
            "seconds": float(math.ceil(time.perf_counter() - began)),
        },
        examples=batches.examples,
    )


def step_to_sum(
    trainee: Trainee,
    batches: GroupBatches,
    plan: RunPlan,
    round_number: int,
    noise: StepSecrets,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> RoundResult:
    """A noisy step for a secure sum: its sum, turned round, times `summed_factor`, as the update of so many
    examples; of what travels. The step along the sum of all is the centre's; what stays at the site rests,
    but the teacher, which follows the weights that came.

    Guarantee: as `train_privately`, of one step. Update times examples is linear in the noised sum, unless
    the gate's bound cuts it, which it has a chance to of less than 1e-30 (`check_summed`): the noise of
    several sites adds up.
    """
    resting_others(plan, trainee.student)
    began = time.perf_counter()
    total = step_sum(trainee, batches, batches.drawn(noise, 0), batches.turn(round_number, 0), plan)
    noised, examples = noise.noised(0, total), batches.examples
    factor = summed_factor(plan) / examples
    trainee.teacher.update(trainee.student, plan.training.teacher_momentum[1])
    on_step(1, math.nan)
    update = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in trainee.shared.items()}
    for name in update.keys() & noised.keys():
        update[name] = (-factor * noised[name]).to(update[name].dtype)
    seconds = float(math.ceil(time.perf_counter() - began))
    return RoundResult(update=update, metrics={"steps": 1.0, "seconds": seconds}, examples=examples)


def step_sum(
    trainee: Trainee,
    batches: GroupBatches,
    groups: Sequence[Group],
    turn: _Turn,
    plan: RunPlan,
) -> dict[str, Tensor]:
    """The sum of the groups' cut gradients by parameter, float64; zeros for no group. As many groups at once
    as the plan's batch holds scans."""
    noisy, student = noisy_of(plan), trainee.student
    names = trained_keys(plan, student)
    parameters = dict(student.named_parameters())
    whole = ClippedSum.of_none({name: parameters[name] for name in names})
    at_once = plan.training.batch_size // noisy.group_size
    for first in range(0, len(groups), at_once):
        some = groups[first : first + at_once]
        batch, draws = batches.apply(some, turn, student.latent_mean.device)
        with GroupGradients(student, names, len(some), noisy.group_size) as watched:
            losses = MeduetObjective(plan.objective)(
                student, trainee.teacher, batch, draws, 1.0, noisy.group_size
            )
            losses.total.backward()  # type: ignore[no-untyped-call]
        whole = whole + clipped_sum(watched.gradients(), noisy.clip_norm)
    return whole.total
