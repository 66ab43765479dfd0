"""Fine-tuning: a downstream network learns from labelled scans; the same loop alone and in a federation.

Patients are drawn, a scan of each; a scan may be moved to another site's entry of the style bank, which shows
the network scanners that none of the labels comes from. Of a whole scan (`volumes.extent: scan`) a step sees
a crop, and validation all of it. Networks that see volumes get them augmented. What is kept is the moving
average of the weights, where one is asked for. Every step has its own generator, from seed, site and step.
Given validation scans, the weights of the step that served them best are kept; test scans are never seen
here. In a federation no validation is given: a round ends where its steps end.

Does not do: choose scans (`client/latents/labelled.py`), send anything (`client/exchanges/finetuning.py`),
measure on test patients (`simulations/downstream/evaluate.py`); the loss is the task's. Source: style bank
for labels of one site: ours.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from client.latents.labelled import LabelledScans, NoLabels
from client.latents.whole_labelled import WholeScan
from federation.exchanges.finetuning import LocalFinetuning
from federation.plan.optimisation import NotFinite
from meduet_models.adamw import AdamW, decay_groups
from meduet_models.downstream.augmentation import augmented
from meduet_models.downstream.networks import predict
from meduet_models.downstream.task import Task
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.unet import DownstreamNetwork
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.downstream.whole_scans import predict_voxels
from meduet_models.objective.teacher import early_momentum
from meduet_models.schedules import cosine, rise
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from scans.volume_plan import VolumePlan

_VALIDATIONS = 10  # over a whole run
_RESTYLED = 0.5  # probability that a scan is restyled to another site, where there is a bank


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a loop leaves, beside the network."""

    losses: tuple[float, ...]
    """Loss of each step."""
    best_step: int
    """Steps after which the kept weights were reached."""
    validation: float | None
    """Score of the kept weights on the validation scans ; None without them."""
    seconds: float
    """Wall time."""


def finetune(
    network: DownstreamNetwork,
    scans: LabelledScans,
    local: LocalFinetuning,
    *,
    seed: int,
    site: int = 0,
    first_step: int = 0,
    total_steps: int | None = None,
    crop_foreground: float = VolumePlan.crop_foreground,
    validation: LabelledScans | None = None,
    style_bank: StyleBank | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Finetuned:
    """Train `network` for `local.steps` steps on `scans`, in place.

    Of whole scans a step draws crops, each with at least `crop_foreground` of foreground.

    In a round of a federation, `first_step` and `total_steps` place these steps within all of them. `on_step`
    is called with the number of steps done and the loss. Raises `NoLabels`, `ValueError` for a class out of
    range, and `NotFinite` before the weights are touched.
    """
    began = time.perf_counter()
    task = task_of(local.task)
    check_answers(task, scans, local.classes)
    if not len(scans):
        raise NoLabels("Expected at least one labelled scan; got none.")
    if validation is not None:
        check_answers(task, validation, local.classes)
        validation = validation if len(validation) else None
    total = total_steps or local.steps
    device = next(network.parameters()).device
    measure_every = math.ceil(local.steps / _VALIDATIONS)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = AdamW(decay_groups(trained, local.weight_decay), lr=local.learning_rate)
    averaged = MovingAverage(network, local.average)
    losses: list[float] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for step in range(local.steps):
        generator = generator_of("fedmeduet finetuning", seed, site, first_step + step)
        rows = _draw(scans, local.batch_size, generator)
        latents, truth = scans.drawn(rows, crop_foreground, generator)
        if style_bank is not None:
            latents = _restyled(style_bank, latents, [scans.site[row] for row in rows], generator)
        seen: tuple[Tensor, ...] = (latents,)
        if isinstance(network, VolumeSegmenter):
            volumes, beside = _volumes_of(scans)[rows].float(), latents if network.reads_latents else None
            if local.augmentation:
                volumes, truth, beside = augmented(volumes, truth, beside, local.augmentation, generator)
            seen = (volumes,) if beside is None else (volumes, beside)
        loss = task.loss(network(*(part.to(device) for part in seen)), truth.to(device))
        losses.append(_finite(loss, "loss", first_step + step))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _finite(
            torch.nn.utils.clip_grad_norm_(trained, local.gradient_clip_norm), "gradient", first_step + step
        )
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(first_step + step, total, local)
        optimiser.step()
        averaged.update(step)
        on_step(step + 1, losses[-1])
        if validation is not None and ((step + 1) % measure_every == 0 or step + 1 == local.steps):
            with averaged.in_place():
                score = validation_score(network, validation, local)
                if best is None or score > best[0]:
                    best = score, step + 1, {n: p.detach().clone() for n, p in network.named_parameters()}
    averaged.keep()
    if best is not None:
        network.load_state_dict(best[2], strict=False)  # parameters alone: buffers never change
    return Finetuned(
        losses=tuple(losses),
        best_step=local.steps if best is None else best[1],
        validation=None if best is None else best[0],
        seconds=time.perf_counter() - began,
    )


def check_answers(task: Task, scans: LabelledScans, classes: int) -> None:
    """Raise `ValueError` for an answer that no output stands for, anywhere in a whole scan."""
    task.check_answers(scans.answers, classes)
    for one in scans.by_voxel:
        task.check_answers(one.classes(), classes)


def validation_score(network: DownstreamNetwork, scans: LabelledScans, local: LocalFinetuning) -> float:
    """The task's score on scans; higher is better. Of whole scans, voxel by voxel, the mean over scans."""
    task = task_of(local.task)
    if not scans.by_voxel:
        return task.score(predicted(network, scans), scans.answers)
    scores = [
        task.score(predicted(network, scans.rows([row])), one.classes()[None])
        for row, one in enumerate(scans.by_voxel)
    ]
    return sum(scores) / len(scores)


def predicted(network: DownstreamNetwork, scans: LabelledScans) -> Tensor:
    """Outputs of a network for scans: of their latents, their volumes, or both.

    Of whole scans, all of each: an output per scan is the mean over windows that cover it, by their
    foreground; outputs per voxel are blended, and asked for one scan at a time.
    """
    if scans.whole is not None:
        of_scan = _all_voxels if scans.per_voxel else _mean_over_windows
        return torch.cat([of_scan(network, one) for one in scans.whole])
    if not isinstance(network, VolumeSegmenter):
        return predict(network, scans.latents)
    volumes = _volumes_of(scans)
    return predict(network, volumes, scans.latents) if network.reads_latents else predict(network, volumes)


def _all_voxels(network: DownstreamNetwork, scan: WholeScan) -> Float[Tensor, "1 classes D H W"]:
    return predict_voxels(lambda crops: predict(network, crops), scan.latents(), scan.grid)[None]


def _mean_over_windows(network: DownstreamNetwork, scan: WholeScan) -> Float[Tensor, "1 outputs"]:
    windows, weights = scan.windows()
    return weights[None] @ predict(network, windows)


class MovingAverage:
    """The moving average of a network's trained weights; with momentum 0 it is the weights themselves."""

    def __init__(self, network: nn.Module, momentum: float) -> None:
        self._momentum = momentum
        trained = [p for p in network.parameters() if p.requires_grad]
        self._own: list[Tensor] = list(trained) if momentum else []
        self._average = [p.detach().clone() for p in self._own]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after step number `step` (from 0)."""
        if self._own:
            torch._foreach_lerp_(self._average, self._own, 1.0 - early_momentum(self._momentum, step))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the average within, and its own weights again after."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def keep(self) -> None:
        """The network has the average from here on."""
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for own, average in zip(self._own, self._average, strict=True):
            was = own.clone()
            own.copy_(average)
            average.copy_(was)


def _volumes_of(scans: LabelledScans) -> Float[Tensor, "b 1 D H W"]:
    assert scans.volumes is not None, "a network that sees volumes is given scans with them"
    return scans.volumes


def learning_rate_at(number: int, total: int, local: LocalFinetuning) -> float:
    """Learning rate of step `number` of `total` (from 0): a straight rise, then a cosine to 0."""
    rising = round(local.warmup * total)
    if number < rising:
        return rise(number, rising, local.learning_rate)
    return cosine(local.learning_rate, 0.0, number - rising, max(1, total - rising))


def _draw(scans: LabelledScans, batch_size: int, generator: torch.Generator) -> list[int]:
    """Different patients, as many as there are up to the batch, and a scan of each."""
    patients = scans.patients
    chosen = torch.randperm(len(patients), generator=generator)[:batch_size].tolist()
    drawn = []
    for patient in chosen:
        own = [row for row, name in enumerate(scans.patient) if name == patients[patient]]
        drawn.append(own[int(torch.randint(len(own), (), generator=generator))])
    return drawn


def _restyled(
    style_bank: StyleBank, latents: Float32[Tensor, "b c d h w"], own: list[int], generator: torch.Generator
) -> Float32[Tensor, "b c d h w"]:
    """Scans of sites with an entry, half of them in the style of a site of the bank."""
    present = torch.tensor([style_bank.sites.index(site) for site in style_bank.present])
    target = present[torch.randint(len(present), (len(own),), generator=generator)]
    stays = torch.rand(len(own), generator=generator) >= _RESTYLED
    at_home = torch.tensor(own)
    stays |= ~torch.isin(at_home, present)
    return style_bank.restyle(latents, at_home, torch.where(stays, at_home, target))


def _finite(value: Tensor, what: str, number: int) -> float:
    if not math.isfinite(plain := float(value.detach())):
        raise NotFinite(
            f"Expected a finite {what} at step {number} of the fine-tuning; got {plain}. The weights are "
            "untouched; lower learning_rate, or look for a scan with values out of range."
        )
    return plain
