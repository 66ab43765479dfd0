"""Every way to learn from labels: one mode at every number of labels and draw, as predictors.

Closed forms (the probe of a pretrained encoder, and the baselines) read tokens on their grid; networks are
trained by the loop that a hospital runs (`client/training/finetuning.py`), stopped by validation patients.
What this file does not do: it opens no test scan and measures nothing (`evaluate.py`).

Axes: b = scans, n = tokens, p = values in a token, d h w = places of a grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from client.latents.labelled import LabelledScans
from client.training.finetuning import finetune
from meduet_models.downstream.baselines import VolumeUNet, fit_per_position, fit_per_scan, mean_label
from meduet_models.downstream.networks import ContentEncoder, PretrainedNetwork, predict
from meduet_models.downstream.task import Pooled, Task
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.unet import DownstreamNetwork, SmallUNet
from meduet_models.meduet import FactorNetwork
from meduet_models.probes.hidden import with_neighbours
from meduet_models.style.bank import StyleBank
from meduet_models.tokens import patchify
from simulations.downstream.draws import Amount, amounts
from simulations.downstream.settings import CLOSED_FORM, DownstreamSettings, Mode

Predictor = Callable[[LabelledScans], Tensor]
"""Scans to the outputs of a task, per voxel or per scan; answers are not looked at."""
_AT_ONCE = 16


@dataclass(frozen=True)
class Fitted:
    """One mode at one number of labels."""

    mode: Mode
    labels: str
    labelled: int
    """Patients with labels in a draw."""
    predictors: tuple[Predictor, ...]
    """One for each draw."""


def predictor_of(network: DownstreamNetwork) -> Predictor:
    """A trained network as a predictor."""
    network.eval()
    return lambda scans: predict(network, scans.latents)


def fitted_mode(
    mode: Mode,
    model: FactorNetwork | None,
    train: LabelledScans,
    validation: LabelledScans,
    settings: DownstreamSettings,
    seed: int,
    style_bank: StyleBank | None,
    progress: Callable[[str, int, int], None],
) -> list[Fitted]:
    """One mode at every number of labels; those that come to the same patients are trained once."""
    per_class = settings.classes > 1 and not task_of(settings.task).per_voxel
    sees = _Seen(_reader(mode, model, train, settings))
    seen, held = sees(train), sees(validation)
    many = settings.draws if mode in CLOSED_FORM else settings.trained_draws
    known: dict[tuple[tuple[str, ...], ...], tuple[Predictor, ...]] = {}
    found = []
    for amount in amounts(settings.label_counts, settings.label_shares):
        drawn = _draws(amount, seen, per_class, seed, many)
        if not drawn:
            continue
        key = tuple(scans.patients for scans in drawn)
        if key not in known:
            predictors = []
            for draw, labelled in enumerate(drawn):
                what = f"{mode}, labels of {len(labelled.patients)}"
                report = lambda step, loss, what=what: progress(what, step, settings.steps)  # noqa: E731
                own = _learned(mode, model, labelled, held, settings, seed + draw, style_bank, report)
                predictors.append(lambda scans, own=own: own(sees(scans)))
            known[key] = tuple(predictors)
        found.append(Fitted(mode, amount.name, len(drawn[0].patients), known[key]))
    return found


def _draws(
    amount: Amount, train: LabelledScans, per_class: bool, seed: int, count: int
) -> list[LabelledScans]:
    """The labelled scans of each draw; one draw where everybody is in it, none where there are too few."""
    first = amount.drawn(train, per_class, seed, 0)
    if first is None:
        return []
    if len(first) == len(train):
        return [first]
    more = [amount.drawn(train, per_class, seed, draw) for draw in range(1, count)]
    return [first, *(scans for scans in more if scans is not None)]


class _Seen:
    """Scans as a mode sees them, read once for each set of scans."""

    def __init__(self, read: Callable[[LabelledScans], Tensor] | None) -> None:
        self._read = read
        self._known: list[tuple[LabelledScans, LabelledScans]] = []

    def __call__(self, scans: LabelledScans) -> LabelledScans:
        """The same scans with what the mode sees in place of their latents."""
        if self._read is None or not len(scans):
            return scans
        for known, seen in self._known:
            if known is scans:
                return seen
        seen = replace(scans, latents=self._read(scans), volumes=None)
        self._known.append((scans, seen))
        return seen


def _reader(
    mode: Mode, model: FactorNetwork | None, train: LabelledScans, settings: DownstreamSettings
) -> Callable[[LabelledScans], Tensor] | None:
    """What a mode sees: latents as they are (None), the volume, nothing, or tokens on their grid
    [b p d h w], of latents or of an encoder's content."""
    if mode in ("frozen", "finetuned", "scratch", "unet"):
        return None
    if mode == "unet_volume":
        return _volumes
    if mode == "label_map":
        return lambda scans: torch.zeros(len(scans), 1, 1, 1, 1)
    config = settings.network if model is None else model.config
    assert config is not None
    if mode in ("ridge", "ridge_neighbours"):
        around = mode == "ridge_neighbours"

        def tokens(scans: LabelledScans) -> Tensor:
            own = patchify(scans.latents, config.patch_size)
            own = with_neighbours(own, config.token_grid) if around else own
            return _on_grid(own, config.token_grid)

        return tokens
    chosen = model if mode == "probe" else _fresh(model, train, settings, settings.plan_seed)
    assert chosen is not None
    encoder = ContentEncoder(chosen, trainable=False).eval()

    @torch.inference_mode()
    def content(scans: LabelledScans) -> Tensor:
        parts = [encoder(chunk)[0] for chunk in torch.split(scans.latents, _AT_ONCE)]
        return _on_grid(torch.cat(parts), config.token_grid)

    return content


def _on_grid(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def _volumes(scans: LabelledScans) -> Tensor:
    assert scans.volumes is not None, "checked before anything is trained"
    return scans.volumes.float()


def _learned(
    mode: Mode,
    model: FactorNetwork | None,
    labelled: LabelledScans,
    validation: LabelledScans,
    settings: DownstreamSettings,
    seed: int,
    style_bank: StyleBank | None,
    report: Callable[[int, float], None],
) -> Predictor:
    """What one draw of labels teaches, as a predictor from scans as the mode sees them."""
    task, classes = task_of(settings.task), settings.classes
    if mode in CLOSED_FORM:
        task.check_answers(labelled.answers, classes)
        return _closed_form(mode, labelled, task, classes, seed)
    network: DownstreamNetwork
    match mode:
        case "unet":
            channels = labelled.latents.shape[1]
            network = SmallUNet(channels, classes, per_voxel=task.per_voxel, seed=seed)
        case "unet_volume":
            network = VolumeUNet(classes, per_voxel=task.per_voxel, seed=seed)
        case "scratch":
            fresh = _fresh(model, labelled, settings, seed)
            network = task.network(fresh, classes, trainable=True, seed=seed)
        case _:
            assert model is not None
            network = task.network(model, classes, trainable=mode == "finetuned", seed=seed)
            if mode == "frozen" and task.fits_pooled:
                return _fitted(task, network, labelled, validation, classes, seed)
    finetune(
        network,
        labelled,
        settings.local(mode),
        seed=seed,
        validation=validation,
        style_bank=style_bank,
        on_step=report,
    )
    return predictor_of(network)


def _closed_form(mode: Mode, labelled: LabelledScans, task: Task, classes: int, seed: int) -> Predictor:
    """The mean label, or the ridge that reads tokens on their grid."""
    if mode == "label_map":
        mean = mean_label(labelled.answers, classes)
        return lambda scans: mean.expand(len(scans), *mean.shape)
    grid = (labelled.latents.shape[2], labelled.latents.shape[3], labelled.latents.shape[4])
    tokens = labelled.latents.flatten(2).transpose(1, 2)  # b n p
    if task.per_voxel:
        fit = fit_per_position(tokens, labelled.answers, classes, grid, labelled.patient, seed)
    else:
        fit = fit_per_scan(tokens, labelled.answers, classes, labelled.patient, seed)
    return lambda scans: fit(scans.latents.flatten(2).transpose(1, 2))


def _fresh(
    model: FactorNetwork | None, labelled: LabelledScans, settings: DownstreamSettings, seed: int
) -> FactorNetwork:
    """An encoder that was not pretrained, with the model's centre and scale of latents, or its own scans'."""
    if model is not None:
        fresh = FactorNetwork(model.config, seed=seed)
        fresh.set_latent_scale(model.latent_mean, model.latent_deviation)
        return fresh
    assert settings.network is not None
    fresh = FactorNetwork(settings.network, seed=seed)
    mean = labelled.latents.mean(dim=(0, 2, 3, 4)).reshape(-1, 1, 1, 1)
    fresh.set_latent_scale(mean.expand_as(fresh.latent_mean), labelled.latents.std(dim=(0, 2, 3, 4)))
    return fresh


def _fitted(
    task: Task,
    network: PretrainedNetwork,
    labelled: LabelledScans,
    validation: LabelledScans,
    classes: int,
    seed: int,
) -> Predictor:
    """What the task fits to pooled content, chosen on the validation patients."""
    for scans in (labelled, validation):
        task.check_answers(scans.answers, classes)
    held = _pooled(network, validation.latents) if len(validation) else np.zeros((0, 0), dtype=np.float32)
    fit = task.fit(
        _pooled(network, labelled.latents), labelled.answers, held, validation.answers, classes, seed
    )
    return lambda scans: fit(_pooled(network, scans.latents))


@torch.inference_mode()
def _pooled(network: PretrainedNetwork, latents: Tensor) -> Pooled:
    chunks: Sequence[Tensor] = torch.split(latents, _AT_ONCE)
    return torch.cat([network.encoder(chunk)[0].mean(dim=1) for chunk in chunks]).numpy()
