"""Training: one round at one site, a loop to be read aloud.

A round starts from the shared weights that came and from what this site kept (home weights, teacher, the
optimiser's moments), takes the plan's number of steps, and gives back the difference of the shared weights.
Schedules run over all steps of the run and depend on round and step alone, so a run that was resumed never
notices. No draw touches a global generator. What stays here: everything in `SiteState`; the optimiser's
moments of the shared weights too. A round that was cut short by the end of its process goes on after the last
step that was written (`client/training/site_state.py`), to the same bits.

Does not do: read scans (`client/latents/batches.py`), bound or send anything (`client/release.py`), show
progress. Source: MeDUET (arXiv:2602.17901), section "Implementation": AdamW, warm-up and cosine, clipping,
cosine EMA of the teacher per step. FedProx (arXiv:1812.06127). The anchor of a style branch that stays home
is ours; Muon (`meduet_models/muon.py`) is not MeDUET's.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.latents.batches import Batches, step_generator
from client.training.site_state import RoundResult, UnderWay
from client.training.trainee import Trainee
from federation.plan.optimisation import descend, learning_rate_at
from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import Losses, MeduetObjective
from meduet_models.objective.teacher import momentum_at
from meduet_models.sharing import shared_keys, style_keys
from meduet_models.weights import StoredWeights
from privacy.clipping import joint_norm

_log = logging.getLogger(__name__)
_TRAINEE, _MEANS = "trainee/", "means/"


def train_round(
    trainee: Trainee,
    batches: Batches,
    plan: RunPlan,
    round_number: int,
    secret: bytes,
    start: Mapping[str, Tensor],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    under_way: UnderWay | None = None,
) -> RoundResult:
    """Train `plan.training.steps_per_round` steps and give back what changed in the shared weights.

    `round` counts from 1; `trainee` is as the round begins; `secret` is what the site draws its batches from.
    `start` is the common start of the style branch,
    its anchor when it stays home. `on_step` is called after each step with its number (from 1) and loss.
    `under_way` is how far the round has come; without, it begins at its first step. Raises `NotFinite`
    before the weights are touched.
    """
    student, teacher, optimiser = trainee.student, trainee.teacher, trainee.optimiser
    training, device = plan.training, student.latent_mean.device
    objective = MeduetObjective(plan.objective)
    tethers = _tethers(student, plan, trainee.shared, start)
    means = _Means(device)

    def load(tensors: StoredWeights) -> None:
        trainee.load(tensors.part(_TRAINEE))
        means.load(tensors.part(_MEANS))

    def changed() -> dict[str, Tensor]:
        whole = {f"{_TRAINEE}{name}": tensor for name, tensor in trainee.tensors().items()}
        return whole | {f"{_MEANS}{name}": tensor for name, tensor in means.tensors().items()}

    done, spent = (0, 0.0) if under_way is None else under_way.resume(load)
    began = time.perf_counter() - spent
    if batches.is_small:
        _log.warning(
            "%d training scans fill batches of %d: scans repeat.", batches.num_scans, training.batch_size
        )

    first = (round_number - 1) * training.steps_per_round
    for step in range(done, training.steps_per_round):
        number = first + step
        progress = number / plan.total_steps

        draw = batches.draw(step_generator(secret, plan.seed, round_number, step))
        batch, draws = batches.apply(draw, device), draw.step.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            losses = objective(student, teacher, batch, draws, progress)
        losses = _with_tethers(losses, tethers)
        loss, norm = descend(losses.total, student, teacher, optimiser, plan, number)

        means.add({"loss.total": losses.total, "grad_norm": norm})
        means.add({f"loss.{name}": term for name, term in losses.terms.items()})
        if under_way is not None:
            seconds = time.perf_counter() - began
            under_way.offer(step + 1, seconds, changed)
        on_step(step + 1, loss)

    last = first + training.steps_per_round - 1
    weights = student.state_dict()
    names = shared_keys(student, plan.style.head, plan.aggregation.method)
    update = {name: weights[name].cpu() - trainee.shared[name].to(weights[name].dtype) for name in names}
    return RoundResult(
        update=update,
        metrics=means.values()
        | {
            "learning_rate": learning_rate_at(last, plan),
            "teacher_momentum": momentum_at(last / plan.total_steps, *training.teacher_momentum),
            "update_norm": joint_norm(update),
            "steps": float(training.steps_per_round),
            "seconds": time.perf_counter() - began,
        },
        examples=batches.num_scans,
    )


@dataclass(frozen=True)
class _Tether:
    """Half of, or the whole, squared distance of some weights to where they began, as a term of the loss."""

    term: str
    weight: float
    factor: float
    pairs: Sequence[tuple[Tensor, Tensor]]

    def squared_distance(self) -> Tensor:
        return self.factor * torch.stack([(now - then).square().sum() for now, then in self.pairs]).sum()


def _tethers(
    student: MeDUET, plan: RunPlan, before: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> list[_Tether]:
    """FedProx holds the shared weights near the round's start, the anchor a style branch near the run's."""
    parameters = dict(student.named_parameters())
    tethers = []
    if plan.training.proximal > 0:
        pairs = [(now, before[name].to(now)) for name, now in parameters.items() if name in before]
        tethers.append(_Tether("proximal", plan.training.proximal, 0.5, pairs))
    if plan.style.head == "local" and plan.style.anchor > 0:
        mine = [name for name in style_keys(student) if name in parameters]
        pairs = [(parameters[name], start[name].to(parameters[name])) for name in mine]
        tethers.append(_Tether("anchor", plan.style.anchor, 1.0, pairs))
    return [tether for tether in tethers if tether.pairs]


def _with_tethers(losses: Losses, tethers: list[_Tether]) -> Losses:
    total, terms = losses.total, dict(losses.terms)
    for tether in tethers:
        terms[tether.term] = tether.squared_distance()
        total = total + tether.weight * terms[tether.term]
    return Losses(total, terms)


class _Means:
    """Averages over the steps in which a value was computed; kept on the device until asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def values(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: torch.stack([total.cpu(), torch.tensor(float(self._counts[name])).double()])
            for name, total in self._sums.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, (total, count) in tensors.items():
            self._sums[name], self._counts[name] = total.to(self._device), int(count)
