"""Every way to learn from labels: one mode at every number of labels and draw, as predictors.

Closed forms (the reading of a frozen encoder, and the baselines) are fitted to what is read of every scan
once; networks are trained by the loop that a hospital runs (`client/training/finetuning.py`), stopped by
validation patients.
What this file does not do: it opens no test scan and measures nothing (`evaluate.py`).

Axes: b = scans, n = tokens, p = values in a token, d h w = places of a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.latents.labelled import LabelledScans
from client.training.finetuning import finetune, predicted
from meduet_models.anatomy_start import started_unet
from meduet_models.downstream.baselines import PlainVolumeUNet, fit_per_position, mean_label
from meduet_models.downstream.task import Reading, Task
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.unet import DownstreamNetwork, SmallUNet
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.probes.hidden import with_neighbours
from meduet_models.style.bank import StyleBank
from meduet_models.tokens import patchify
from simulations.downstream.draws import Amount, amounts
from simulations.downstream.settings import CLOSED_FORM, VOLUME_KINDS, DownstreamSettings, Mode

Predictor = Callable[[LabelledScans], Tensor]
"""Scans to the outputs of a task, per voxel or per scan; answers are not looked at."""


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
    return lambda scans: predicted(network, scans)


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
        if scans.whole is None:
            read = self._read(scans)
        else:
            read = torch.cat([_mean_read(self._read, scans.rows([row])) for row in range(len(scans))])
        seen = replace(scans, latents=read, volumes=None, whole=None)
        self._known.append((scans, seen))
        return seen


def _mean_read(read: Callable[[LabelledScans], Tensor], scan: LabelledScans) -> Tensor:
    """What is read of one whole scan: the mean over windows that cover it, by their foreground."""
    assert scan.whole is not None
    windows, weights = scan.whole[0].windows()
    of_windows = read(replace(scan.rows([0] * len(windows)), latents=windows, whole=None))
    mean: Tensor = torch.tensordot(weights, of_windows, dims=1)
    return mean[None]


def _reader(
    mode: Mode, model: FactorNetwork | None, train: LabelledScans, settings: DownstreamSettings
) -> Callable[[LabelledScans], Tensor] | None:
    """What a mode sees: latents as they are (None), the volume, nothing, or tokens, of latents or of an
    encoder's content, as `_wide` has them."""
    if mode in ("finetuned", "scratch", "unet", *VOLUME_KINDS):
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
            return _wide(own)

        return tokens
    chosen = _fresh(model, train, settings, settings.plan_seed) if mode == "random" else model
    assert chosen is not None
    reading: Reading = "tokens" if mode == "frozen_tokens" else "code"
    return lambda scans: _wide(task_of(settings.task).seen(chosen, reading, scans.latents))


def _wide(tokens: Tensor) -> Tensor:
    """Tokens [b n k] where latents are expected."""
    return tokens[:, None, None]


def _narrow(scans: LabelledScans) -> Tensor:
    """Back from `_wide`."""
    return scans.latents[:, 0, 0]


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
        config = settings.network if model is None else model.config
        return _closed_form(mode, labelled, task, classes, config, seed)
    network: DownstreamNetwork
    match mode:
        case "unet":
            channels = labelled.latents.shape[1]
            network = SmallUNet(channels, classes, per_voxel=task.per_voxel, seed=seed)
        case "unet_volume":
            network = PlainVolumeUNet(classes, per_voxel=task.per_voxel, seed=seed)
        case "volume_unet" | "volume_start" | "joined":
            body = started_unet("none" if mode == "volume_unet" else settings.anatomy_start, seed=seed)
            network = VolumeSegmenter(body, classes, content=model if mode == "joined" else None, seed=seed)
        case _:
            start = _fresh(model, labelled, settings, seed) if mode == "scratch" else model
            assert start is not None
            network = task.network(start, classes, trainable=True, seed=seed)
    finetune(
        network,
        labelled,
        settings.local_of(mode),
        seed=seed,
        crop_foreground=settings.crop_foreground,
        validation=validation,
        style_bank=style_bank,
        on_step=report,
    )
    return predictor_of(network)


def _closed_form(
    mode: Mode, labelled: LabelledScans, task: Task, classes: int, config: NetworkConfig | None, seed: int
) -> Predictor:
    """The mean label, or a regression on what was read of the scans."""
    if mode == "label_map":
        mean = mean_label(labelled.answers, classes)
        return lambda scans: mean.expand(len(scans), *mean.shape)
    assert config is not None
    answers, patients = labelled.answers, labelled.patient
    if task.per_voxel and mode in ("ridge", "ridge_neighbours"):
        fitted = fit_per_position(_narrow(labelled), answers, classes, config.token_grid, patients, seed)
    else:
        fitted = task.fit(_narrow(labelled), answers, patients, classes, config, seed)
    return lambda scans: fitted(_narrow(scans))


def _fresh(
    model: FactorNetwork | None, labelled: LabelledScans, settings: DownstreamSettings, seed: int
) -> FactorNetwork:
    """An encoder that was not pretrained, with the model's centre and scale of latents, or its own scans'."""
    if model is not None:
        fresh = FactorNetwork(model.config, seed=seed)
        fresh.set_latent_scale(model.latent_mean, model.latent_deviation)
        if fresh.embed_volume is not None and model.embed_volume is not None:
            fresh.embed_volume.see_as(model.embed_volume)
        return fresh
    assert settings.network is not None
    if settings.network.encoder == "volume_unet":
        raise ValueError(
            "Expected a pretrained model with network.encoder=volume_unet, whose picture of latents a run "
            "fits; got none. Give its run, or set network.encoder=vit."
        )
    fresh = FactorNetwork(settings.network, seed=seed)
    mean = labelled.latents.mean(dim=(0, 2, 3, 4)).reshape(-1, 1, 1, 1)
    fresh.set_latent_scale(mean.expand_as(fresh.latent_mean), labelled.latents.std(dim=(0, 2, 3, 4)))
    return fresh
