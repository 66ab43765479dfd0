"""Pretraining at the centre, on public scans in the sites' protected styles: no patient is in it.

The unchanged objective, the plan's optimiser, schedules and number of steps; a step draws public scans and a
site for each, and sees them in that site's style and, as the known answer of the swap, in the partner's.
Every draw follows from the plan's seed and the step, so a run that was stopped goes on to the same weights.

What this file does not do: ask a site anything, or read a scan; restyling and the objective are in
`meduet_models/`.

Axes: m = public scans, b = scans of a step, c d h w = latents.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.survey import survey_layout
from federation.plan.optimisation import descend, optimiser_of
from federation.plan.plan import RunPlan
from federation.wire.messages import Tensors
from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import MeduetObjective, StepBatch, draw_step
from meduet_models.objective.teacher import Teacher
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from meduet_models.style.restyling import own_entries, restyle_each
from meduet_models.weights import part_of

CENTRE = "centre"
"""Who trains, in a round's report."""
_STUDENT, _TEACHER, _MOMENTS = "student/", "teacher/", "moments/"


class PhantomTraining:
    """The training of one run, from wherever it is."""

    def __init__(
        self,
        plan: RunPlan,
        public: Float[Tensor, "m c d h w"],
        style_bank: StyleBank,
        start: Tensors,
        state: Tensors,
        device: torch.device,
    ) -> None:
        """`start` is the plan's start, all of it; `state` what `state` gave after a round; empty: `start`,
        with the bank's latent scale."""
        self._plan, self._public, self._style_bank, self._device = plan, public, style_bank, device
        self._own = own_entries(public, survey_layout(plan))
        self._present = tuple(style_bank.sites.index(site) for site in style_bank.present)
        student = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
        student.load_state_dict(start)
        student.set_latent_scale(style_bank.centre, style_bank.scale)
        self._student = student.to(device)
        self._teacher = Teacher(self._student)
        self._optimiser = optimiser_of(self._student, plan)
        if state:
            self._load(state)

    def weights(self) -> Tensors:
        """All weights, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._student.state_dict().items()}

    def state(self) -> Tensors:
        """All that a step changes."""
        whole = {f"{_STUDENT}{name}": tensor for name, tensor in self._student.state_dict().items()}
        whole |= {f"{_TEACHER}{name}": t for name, t in self._teacher.network.state_dict().items()}
        for name, parameter in self._student.named_parameters():
            for moment, tensor in self._optimiser.state.get(parameter, {}).items():
                whole[f"{_MOMENTS}{moment}/{name}"] = tensor
        return {name: tensor.detach().cpu().clone() for name, tensor in whole.items()}

    def round(self, number: int) -> dict[str, Any]:
        """Take the steps of round `number` (from 1); what there is to say of them, in the form of a round's
        report. Raises `NotFinite`."""
        steps, began = self._plan.training.steps_per_round, time.perf_counter()
        sums: dict[str, list[float]] = {}
        for step in range((number - 1) * steps, number * steps):
            for name, value in self._step(step).items():
                sums.setdefault(name, []).append(value)
        loss = {name: sum(values) / len(values) for name, values in sums.items()}
        seconds = time.perf_counter() - began
        own = {"examples": len(self._public), "seconds": seconds, "loss": loss}
        return {"round": number, "seconds": seconds, "sites": {CENTRE: own}, "refused": {}, "loss": loss}

    def _step(self, number: int) -> dict[str, float]:
        plan, training = self._plan, self._plan.training
        progress = number / plan.total_steps
        batch, draws = self._drawn(number)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            losses = MeduetObjective(plan.objective)(self._student, self._teacher, batch, draws, progress)
        total, _ = descend(losses.total, self._student, self._teacher, self._optimiser, plan, number)
        return {"total": total} | {name: float(term.detach()) for name, term in losses.terms.items()}

    def _drawn(self, number: int) -> tuple[StepBatch, Any]:
        plan = self._plan
        generator = generator_of("phantom training", plan.seed, number)
        size = plan.training.batch_size
        rows = torch.randint(len(self._public), (size,), generator=generator)
        draws = draw_step(generator, size, plan.network.num_tokens, plan.objective, self._present)
        assert draws.target_site is not None, "a bank has a style"
        site, swapped = draws.target_site, draws.target_site[draws.partner]
        latents, own = self._public[rows], self._own.each(lambda values: values[rows])
        batch = StepBatch(
            latents=restyle_each(latents, own, self._style_bank, site).to(self._device),
            site=site.to(self._device),
            restyled=restyle_each(latents, own, self._style_bank, swapped).to(self._device),
            restyled_site=swapped.to(self._device),
            subject=rows.to(self._device),
        )
        return batch, draws.to(self._device)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken from."""
        self._student.load_state_dict(part_of(state, _STUDENT))
        self._teacher.network.load_state_dict(part_of(state, _TEACHER))
        parameters = dict(self._student.named_parameters())
        for key, tensor in part_of(state, _MOMENTS).items():
            moment, _, name = key.partition("/")
            kept = self._optimiser.state[parameters[name]]
            kept[moment] = tensor.clone() if moment == "step" else tensor.to(self._device, copy=True)
