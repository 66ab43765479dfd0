"""Downstream evaluation: what pretrained content is worth with few labels, on seen and on unseen hospitals.

For each share of labelled patients: the pretrained encoder frozen and read in closed form, from its content
code or from its tokens (`meduet_models/downstream/frozen.py`), the same fine-tuned, the same network from
scratch, and a small U-Net over latents; on request a U-Net on the volume, from scratch, from public anatomy,
or with content tokens joined. All but the first are trained by the loop that a hospital runs
(`client/training/finetuning.py`). The step to stop at is chosen on validation patients of the training
hospitals; test scans are looked at once, after every network is trained.

Does not do: pretrain, federate (`server/exchanges/finetuning.py`), draw (`simulations/downstream/report.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from client.latents.labelled import LabelledScans
from client.training.finetuning import finetune, predicted
from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.anatomy_start import AnatomyStart, started_unet
from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.task import Grid, Reading, Target
from meduet_models.downstream.tasks import task_of
from meduet_models.downstream.unet import DownstreamNetwork, SmallUNet
from meduet_models.downstream.volume_networks import VolumeSegmenter
from meduet_models.meduet import FactorNetwork, NetworkConfig
from meduet_models.style.bank import StyleBank
from simulations.downstream.metrics import estimates

__all__ = [
    "DownstreamRow",
    "DownstreamSettings",
    "LabelledScans",
    "evaluate_downstream",
    "predictor_of",
    "rows_of",
]

TrainedMode = Literal[
    "frozen", "frozen_tokens", "finetuned", "scratch", "unet", "volume_unet", "volume_start", "joined"
]
"""What is compared. `volume_unet`: a U-Net on the volume from scratch; `volume_start`: the same from
`anatomy_start`; `joined`: that, with the content tokens of the pretrained encoder at its deepest level."""
Mode = TrainedMode | Literal["federated"]
Predictor = Callable[[LabelledScans], Tensor]
"""Scans to the outputs of a task, per voxel or per scan; answers are not looked at."""

_READINGS: Mapping[str, Reading] = {"frozen": "code", "frozen_tokens": "tokens"}
_PRETRAINED: tuple[Mode, ...] = ("frozen", "frozen_tokens", "finetuned", "joined")
VOLUME_MODES: Mapping[str, NetworkKind] = {
    "volume_unet": "volume_unet",
    "volume_start": "volume_unet",
    "joined": "joined",
}
"""Those that are shown volumes, and their network."""
_AVERAGE = 0.98  # of the weights of networks that see volumes


@dataclass(frozen=True, kw_only=True)
class DownstreamSettings:
    """How downstream networks are trained and measured."""

    task: str
    """What is predicted: the name of a downstream task."""
    classes: int
    """Classes, the background of a segmentation included; 1 for a number."""
    target: Target = field(default_factory=Target)
    """What is predicted, where a covariate is."""
    spacing_mm: tuple[float, float, float]
    """Voxel spacing of the volumes; distances are in mm."""
    label_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 1.0)
    """Shares of the training patients whose labels are used; at least one patient."""
    modes: tuple[TrainedMode, ...] = (
        "frozen",
        "finetuned",
        "scratch",
        "unet",
    )
    """What is compared: a frozen model read from its code (segmentation: from its tokens) or from all of its
    tokens, and networks that are trained."""
    steps: int = 200
    """Optimiser steps of each network."""
    batch_size: int = 8
    """Scans per step, at most."""
    learning_rate: float = 2e-3
    """Peak learning rate of each network."""
    anatomy_start: AnatomyStart = "none"
    """What `volume_start` and `joined` start from."""
    bootstrap: int = 1000
    """Resamples of the patients, for the intervals."""
    tolerance_mm: float = 1.0
    """Distance within which two surfaces agree, for surface Dice."""
    network: NetworkConfig | None = None
    """The encoder of `scratch` where no pretrained model is given, which is what it copies otherwise."""

    @property
    def local(self) -> LocalFinetuning:
        """The loop's settings."""
        return LocalFinetuning(
            task=self.task,
            classes=self.classes,
            encoder="finetuned",
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )

    def local_of(self, mode: Mode) -> LocalFinetuning:
        """The same for one mode: networks that see volumes get them augmented, and their weights averaged."""
        if mode not in VOLUME_MODES:
            return self.local
        return replace(self.local, network=VOLUME_MODES[mode], augmentation=1.0, average=_AVERAGE)


@dataclass(frozen=True)
class DownstreamRow:
    """One number of the table."""

    task: str
    mode: Mode
    label_share: float
    test: str
    """Which test scans: "seen", "held_out", or any other name."""
    metric: str
    """Name of one of the task's metrics."""
    value: float
    """Mean over patients, or of all of them. NaN where there is none."""
    low: float
    high: float
    """95% interval, bootstrap over patients."""
    patients: int
    """Test patients."""
    undefined: int
    """Of these, without a value."""
    labelled: int
    """Patients whose labels were used in training."""


def evaluate_downstream(
    model: FactorNetwork | None,
    train: LabelledScans,
    validation: LabelledScans,
    tests: Mapping[str, LabelledScans],
    settings: DownstreamSettings,
    seed: int,
    *,
    style_bank: StyleBank | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[DownstreamRow]:
    """Train every mode at every label share, then measure each on every test set.

    `model` None: only modes that need no pretrained encoder. With a `style_bank`, half of the scans of a
    batch are restyled to another site. `progress` is called with what is trained, steps done and steps in
    all. Raises `ValueError` for modes that cannot be, and for labels that are missing or out of range.
    """
    _check(model, settings, style_bank)
    trained: list[tuple[Mode, float, int, Predictor]] = []
    mode: Mode
    for mode in settings.modes:
        known: dict[int, Predictor] = {}  # shares that come to the same patients are trained once
        for share in settings.label_shares:
            labelled = train.share(share, seed)
            count = len(labelled.patients)
            if count not in known:
                what = f"{mode}, labels of {count}"
                report = lambda step, loss, what=what: progress(what, step, settings.steps)  # noqa: E731
                known[count] = _trained(mode, model, labelled, validation, settings, seed, style_bank, report)
            trained.append((mode, share, count, known[count]))
    measured: dict[tuple[int, str], list[DownstreamRow]] = {}
    rows: list[DownstreamRow] = []
    for mode, share, count, predictor in trained:
        for name, scans in tests.items():
            key = (id(predictor), name)
            if key not in measured:
                measured[key] = rows_of(predictor, scans, settings, seed, mode, share, name, count)
            rows += [replace(row, label_share=share) for row in measured[key]]
    return rows


def rows_of(
    predictor: Predictor,
    scans: LabelledScans,
    settings: DownstreamSettings,
    seed: int,
    mode: Mode,
    share: float,
    test: str,
    labelled: int,
) -> list[DownstreamRow]:
    """Measure one trained network on one test set."""
    task = task_of(settings.task)
    task.check_answers(scans.answers, settings.classes)
    grid = Grid(spacing_mm=settings.spacing_mm, tolerance_mm=settings.tolerance_mm)
    measured = task.measure(predictor(scans), scans.answers, settings.target, grid)
    found = estimates(measured, scans.patient, settings.bootstrap, seed)
    patients = len(scans.patients)
    return [
        DownstreamRow(
            settings.task, mode, share, test, metric, e.value, e.low, e.high, patients, e.undefined, labelled
        )
        for metric, e in found.items()
    ]


def predictor_of(network: DownstreamNetwork) -> Predictor:
    """A trained network as a predictor."""
    network.eval()
    return lambda scans: predicted(network, scans)


def _check(model: FactorNetwork | None, settings: DownstreamSettings, style_bank: StyleBank | None) -> None:
    wanted = [mode for mode in settings.modes if mode in _PRETRAINED]
    if model is None and wanted:
        raise ValueError(f"Expected a pretrained model for {', '.join(wanted)}; got none.")
    if settings.anatomy_start != "none" and not {"volume_start", "joined"} & set(settings.modes):
        raise ValueError("anatomy_start has no effect without mode volume_start or joined: leave it out.")
    if "volume_start" in settings.modes and settings.anatomy_start == "none":
        raise ValueError("Expected anatomy_start for mode volume_start; from none it is mode volume_unet.")
    if model is not None and settings.network is not None:
        raise ValueError(
            "network has no effect beside a pretrained model, whose shape is taken: leave it out."
        )
    if model is None and settings.network is None and "scratch" in settings.modes:
        raise ValueError("Expected network for mode scratch without a pretrained model; got none.")
    if style_bank is not None and "volume_unet" in {VOLUME_MODES.get(mode) for mode in settings.modes}:
        raise ValueError(
            "bank has no effect on a U-Net on the volume, which sees no latents: leave one of them out."
        )
    if style_bank is not None and all(mode in _READINGS for mode in settings.modes):
        raise ValueError(
            f"bank has no effect on {', '.join(settings.modes)}, fitted in closed form: leave it out."
        )
    if task_of(settings.task).per_voxel and "frozen_tokens" in settings.modes:
        raise ValueError("frozen_tokens is frozen with task=segmentation, which reads tokens: leave it out.")


def _trained(
    mode: Mode,
    model: FactorNetwork | None,
    labelled: LabelledScans,
    validation: LabelledScans,
    settings: DownstreamSettings,
    seed: int,
    style_bank: StyleBank | None,
    report: Callable[[int, float], None],
) -> Predictor:
    network: DownstreamNetwork
    task, classes = task_of(settings.task), settings.classes
    match mode:
        case "unet":
            channels = labelled.latents.shape[1]
            network = SmallUNet(channels, classes, per_voxel=task.per_voxel, seed=seed)
        case "volume_unet" | "volume_start" | "joined":
            body = started_unet("none" if mode == "volume_unet" else settings.anatomy_start, seed=seed)
            network = VolumeSegmenter(body, classes, content=model if mode == "joined" else None, seed=seed)
        case "scratch":
            fresh = _fresh(model, labelled, settings, seed)
            network = task.network(fresh, classes, trainable=True, seed=seed)
        case _:
            assert model is not None
            if mode in _READINGS:
                task.check_answers(labelled.answers, classes)
                reading, known = _READINGS[mode], (labelled.latents, labelled.answers, labelled.patient)
                read = task.read(model, reading, *known, classes, seed)
                return lambda scans: read(scans.latents)
            network = task.network(model, classes, trainable=True, seed=seed)
    finetune(
        network,
        labelled,
        settings.local_of(mode),
        seed=seed,
        validation=validation,
        style_bank=style_bank,
        on_step=report,
    )
    return predictor_of(network)


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
