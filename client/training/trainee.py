"""The trainee: student, teacher and optimiser of a site, put together for a round and taken apart after it.

Put together from the shared weights that came and from what the site kept (`client/training/site_state.py`);
taken apart into what it keeps. The optimiser's moments of the shared weights are kept with the others: they
belong to this site's gradients. Over 12 rounds of 8 steps of AdamW that made no difference to starting them
anew (bench/optimiser_moments.py: held-out error within 2%, two seeds); it is kept because a round then never
begins with AdamW's first, full-size steps.

Does not do: steps (`client/training/pretraining.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from client.training.site_state import SiteState
from federation.exchanges.private_rounds import travelling_keys
from federation.plan.optimisation import optimiser_of
from federation.plan.plan import RunPlan
from meduet_models.adamw import AdamW
from meduet_models.meduet import MeDUET
from meduet_models.muon import Muon
from meduet_models.objective.teacher import Teacher
from meduet_models.weights import StoredWeights, shapes_of

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_NETWORKS = ("student", "teacher")


class WrongWeights(ValueError):
    """Tensors that came, or were kept, are not those of the plan's network."""


@dataclass(frozen=True)
class Trainee:
    """What a round changes: student, teacher, optimiser."""

    student: MeDUET
    teacher: Teacher
    optimiser: AdamW
    shared: Mapping[str, Tensor]
    """The shared weights as they came; nothing writes to them."""

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
        optimiser = optimiser_of(student, plan)
        trainee = Trainee(student, teacher, optimiser, shared)
        trainee._load_moments(kept.optimiser)
        if compile:
            for network in (student, teacher.network):
                network.encoder.compile()
                network.decoder.compile()
        return trainee

    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes, where it is: `student/…`, `teacher/…`, `<moment>/<parameter>`; not
        copied."""
        networks = zip(_NETWORKS, (self.student, self.teacher.network), strict=True)
        whole = {f"{kind}/{n}": t for kind, network in networks for n, t in network.state_dict().items()}
        return whole | self._moments()

    def load(self, tensors: StoredWeights) -> None:
        """Become what `tensors` were taken from; raises `WrongWeights` before anything has changed."""
        parts = {kind: tensors.part(f"{kind}/") for kind in (*_NETWORKS, *_MOMENTS)}
        if len(tensors) != sum(map(len, parts.values())):
            raise WrongWeights("Expected student, teacher and moments; there is more.")
        networks = dict(zip(_NETWORKS, (self.student, self.teacher.network), strict=True))
        for kind, network in networks.items():
            _check(network, parts[kind], f"the {kind} of a round under way")
        shapes = {name: tuple(parameter.shape) for name, parameter in self.student.named_parameters()}
        for moment in _MOMENTS:
            wanted = {
                n: () if moment == "step" else shapes.get(n)
                for n in parts["exp_avg"]
                if moment == "exp_avg" or n not in self._matrices()
            }
            if parts[moment].shapes() != wanted:
                raise WrongWeights(f"Expected the optimiser's {moment!r} of this network; others came.")
        for kind, network in networks.items():
            network.load_state_dict(parts[kind])
        self._load_moments(tensors)

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{moment}/{name}": self.optimiser.state[parameter][moment].detach()
            for name, parameter in self.student.named_parameters()
            if parameter in self.optimiser.state
            for moment in _MOMENTS
            if moment in self.optimiser.state[parameter]
        }

    def _matrices(self) -> set[str]:
        """Names of the parameters of which there is a momentum and nothing else."""
        if not isinstance(self.optimiser, Muon):
            return set()
        own = {id(matrix) for matrix in self.optimiser.matrices}
        return {name for name, parameter in self.student.named_parameters() if id(parameter) in own}

    def _load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        self.optimiser.state.clear()
        for name, parameter in self.student.named_parameters():
            if f"exp_avg/{name}" in tensors:
                self.optimiser.state[parameter] = {
                    moment: tensors[f"{moment}/{name}"].to(parameter.device, copy=True)
                    for moment in _MOMENTS
                    if f"{moment}/{name}" in tensors
                }

    def state(self, plan: RunPlan, round_number: int, began_from: int) -> SiteState:
        """What the site keeps after a round, where it is; not copied."""
        return SiteState(
            round=round_number,
            began_from=began_from,
            home={n: tensor for n, tensor in self.student.state_dict().items() if n not in self.shared},
            teacher=self.teacher.network.state_dict(),
            optimiser=self._moments(),
        )


def student_of(plan: RunPlan, shared: Mapping[str, Tensor], kept: SiteState | None) -> MeDUET:
    """The network with the shared weights that came and the home weights that were kept, or those of the
    plan's seed; on the CPU."""
    student = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    expected = set(travelling_keys(plan, student))
    if wrong := sorted(expected ^ set(shared)):
        raise WrongWeights(
            f"Expected the shared weights of this plan; {wrong[0]!r} is missing or not one of them."
        )
    home = {n: t for n, t in student.state_dict().items() if n not in shared} if kept is None else kept.home
    _load(student, {**home, **shared}, "shared and home weights together")
    return student


def _load(network: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    _check(network, tensors, what)
    network.load_state_dict(tensors)


def _check(network: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    expected, came = shapes_of(network.state_dict()), shapes_of(tensors)
    if wrong := sorted(name for name in {*expected, *came} if expected.get(name) != came.get(name)):
        raise WrongWeights(
            f"Expected {what} to be those of the plan's network; {wrong[0]!r} is "
            f"{came.get(wrong[0], 'missing')} and should be {expected.get(wrong[0], 'absent')}."
        )
