"""The trainee: student, teacher and optimiser of a site, put together for a round and taken apart after it.

Put together from the shared weights that came and from what the site kept (`client/site_state.py`); taken
apart into what it keeps. AdamW's moments of the shared weights are kept with the others: they belong to this
site's gradients. Over 12 rounds of 8 steps that made no difference to starting them anew
(bench/optimiser_moments.py: held-out error within 2%, two seeds); it is kept because a round then never
begins with AdamW's first, full-size steps.

Does not do: steps (`client/training.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from client.site_state import SiteState
from federation.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys
from meduet_models.teacher import Teacher

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class WrongWeights(ValueError):
    """Tensors that came, or were kept, are not those of the plan's network."""


@dataclass(frozen=True)
class Trainee:
    """What a round changes: student, teacher, optimiser."""

    student: MeDUET
    teacher: Teacher
    optimiser: torch.optim.AdamW

    @staticmethod
    def of(
        plan: RunPlan,
        shared: Mapping[str, Tensor],
        kept: SiteState,
        device: torch.device,
        compile: bool = False,
    ) -> "Trainee":
        """The network at the start of a round, from the shared weights and what the site kept.

        `compile` compiles encoder and decoder of both networks. Raises `WrongWeights` naming the first tensor
        that is missing, unknown or of another shape.
        """
        student = student_of(plan, shared, kept).to(device)
        teacher = Teacher(student)
        if kept.teacher:
            _load(teacher.network, kept.teacher, "the teacher that was kept")
        # Norms, biases and the mask token are not decayed.
        groups = [[p for p in student.parameters() if (p.ndim < 2) is flat] for flat in (False, True)]
        optimiser = torch.optim.AdamW(
            [
                {"params": groups[0], "weight_decay": plan.training.weight_decay},
                {"params": groups[1], "weight_decay": 0.0},
            ],
            lr=plan.training.learning_rate,
            betas=plan.training.betas,
            fused=True,
        )
        for name, parameter in student.named_parameters():
            if f"step/{name}" in kept.optimiser:
                optimiser.state[parameter] = {
                    moment: kept.optimiser[f"{moment}/{name}"].to(device, copy=True) for moment in _MOMENTS
                }
        if compile:
            for network in (student, teacher.network):
                network.encoder.compile()
                network.decoder.compile()
        return Trainee(student, teacher, optimiser)

    def state(self, plan: RunPlan, round: int, began_from: int) -> SiteState:
        """What the site keeps after a round, on the CPU."""
        mine = self.student.state_dict()
        moments = {
            f"{moment}/{name}": self.optimiser.state[parameter][moment].detach().cpu()
            for name, parameter in self.student.named_parameters()
            if parameter in self.optimiser.state
            for moment in _MOMENTS
        }
        return SiteState(
            round=round,
            began_from=began_from,
            home={
                n: mine[n].cpu() for n in home_keys(self.student, plan.style.head, plan.aggregation.method)
            },
            teacher={name: tensor.cpu() for name, tensor in self.teacher.network.state_dict().items()},
            optimiser=moments,
        )


def student_of(plan: RunPlan, shared: Mapping[str, Tensor], kept: SiteState) -> MeDUET:
    """The network with the shared weights that came and the home weights that were kept; on the CPU."""
    student = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    expected = set(shared_keys(student, plan.style.head, plan.aggregation.method))
    if wrong := sorted(expected ^ set(shared)):
        raise WrongWeights(
            f"Expected the shared weights of this plan; {wrong[0]!r} is missing or not one of them."
        )
    _load(student, {**kept.home, **shared}, "shared and home weights together")
    return student


def _load(network: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    came = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in {*expected, *came} if expected.get(name) != came.get(name)):
        raise WrongWeights(
            f"Expected {what} to be those of the plan's network; {wrong[0]!r} is "
            f"{came.get(wrong[0], 'missing')} and should be {expected.get(wrong[0], 'absent')}."
        )
    network.load_state_dict(tensors)
