"""`meduet-simulate --config-name downstream`: what a finished run's encoder is worth with labels.

Opens the folder of a run, its hospitals as they were, and the hospitals that the run held out; trains and
measures (`downstream.py`), fine-tunes in the federation if asked to, and leaves table, figure and page.
Held-out hospitals are measured on once, after everything is trained. Does not do: pretrain, or change
anything of the run but the books of its sites, which record what left them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from client.app import make_client_app
from client.latents.labelled import LabelledScans, NoLabels
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning, check_sees_volumes, check_target
from federation.plan.finetuning_privacy import FinetunePrivacy, with_noise
from forms.form import build
from meduet_models.anatomy_start import AnatomyStart
from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.task import Target
from meduet_models.downstream.tasks import task_of
from meduet_models.threads import fixed_threads
from server.config import plain
from server.exchanges.finetuning import FinetunedRun, pretrained_sha256, run_finetuning
from server.observer import RoundObserver
from simulations.downstream.draws import Amount
from simulations.downstream.evaluate import (
    DownstreamSettings,
    Fitted,
    Mode,
    evaluate_downstream,
    predictor_of,
    rows_of,
)
from simulations.downstream.fairness import groups_of
from simulations.downstream.report import write_downstream
from simulations.downstream.settings import SEES_VOLUMES, VOLUME_RATE, check_whole_scans
from simulations.engines.in_process import FixedThreads, InProcessGrid
from simulations.finished_run import FinishedRun, open_run
from simulations.hospitals.labelled import Part, known_answers, known_covariates, num_classes
from simulations.progress import Live

_ROUNDS, _CLIP = 5, 20.0


@dataclass(frozen=True, kw_only=True)
class DownstreamRunSettings:
    """What conf/downstream.yaml says."""

    pretrained: str
    """Folder of a finished run."""
    folder: str
    """Where table, figure and page go."""
    seed: int
    """Fixes every draw."""
    task: str
    """What is predicted: the name of a downstream task."""
    classes: int | None
    """Classes; none: they follow from the target or `label_values`, or are counted from the labels."""
    label_values: dict[int, int]
    """Segmentation: values of label files and the classes that they become; all others are background."""
    target: str
    """The covariate to predict, of a task that predicts one."""
    target_values: tuple[str, ...]
    """Its values, in the order of the classes; of a number the ends of its range."""
    modes: tuple[Mode, ...]
    """What is compared."""
    label_counts: tuple[int, ...]
    """Numbers of patients (of each class, of a task with classes) whose labels are used."""
    label_shares: tuple[float, ...]
    """Shares of the training patients whose labels are used."""
    draws: int
    """Draws of the labelled patients for what is in closed form."""
    trained_draws: int
    """Draws for what is trained."""
    label_sites: tuple[str, ...]
    """Hospitals whose labels train; empty: all."""
    bank: bool
    """Whether half of the scans are shown in another hospital's style."""
    steps: int
    """Optimiser steps of each network."""
    batch_size: int
    """Scans per step, at most."""
    learning_rate: float
    """Peak learning rate."""
    anatomy_start: AnatomyStart
    """What a U-Net on the volume starts from: canonical, shapes, none."""
    bootstrap: int
    """Resamples of the test patients."""
    tolerance_mm: float
    """Tolerance of surface Dice."""
    network: NetworkKind
    """What the federation fine-tunes: tokens, volume_unet, joined."""
    federated: bool
    """Whether to fine-tune in the federation too."""
    encoder: Literal["frozen", "finetuned"]
    """Whether the federation's encoder stays as it came."""
    rounds: int
    """Rounds of the federation; the steps are divided among them."""
    update_clip_norm: float
    """L2 norm to which the federation clips a hospital's mean update."""
    privacy: FinetunePrivacy | None
    """Differential privacy of the federation's fine-tuning."""

    def __post_init__(self) -> None:
        """Refuse settings that have no effect."""
        said = (self.network, self.encoder, self.rounds, self.update_clip_norm, self.privacy)
        if said != ("tokens", "finetuned", _ROUNDS, _CLIP, None) and not self.federated:
            raise ValueError(
                "network, encoder, rounds, update_clip_norm and privacy have no effect without "
                "federated=true."
            )
        starts = self.network != "tokens" or {"volume_start", "joined"} & set(self.modes)
        if self.anatomy_start != "none" and not starts:
            raise ValueError(
                "anatomy_start has no effect without mode volume_start or joined, or a network on the volume."
            )
        if self.federated and (self.label_sites or self.bank):
            raise ValueError(
                "federated=true uses every hospital's labels, as they are: leave out label_sites and bank."
            )


def run_downstream(config: DictConfig) -> Path:
    """Everything from settings to page; returns the page's path.

    Raises `ValueError` for settings that are wrong, and for a folder that holds no finished run.
    """
    values = plain(config)
    ends = values["target_values"]  # a plan names values by their text
    values["target_values"] = [f"{end:g}" if isinstance(end, (int, float)) else end for end in ends]
    asked = build(
        DownstreamRunSettings,
        {f.name: values[f.name] for f in dataclasses.fields(DownstreamRunSettings)},
        "downstream",
    )
    with Live() as live:
        opened = open_run(Path(asked.pretrained), live)
        with fixed_threads(opened.settings.engine.cpus_per_site):
            return _evaluate(asked, opened, live)


def _evaluate(asked: DownstreamRunSettings, opened: FinishedRun, live: Live) -> Path:
    plan = opened.plan
    if odd := [name for name in asked.label_sites if name not in plan.sites]:
        raise ValueError(f"Expected label_sites among {', '.join(plan.sites)}; got {odd[0]!r}.")
    if plan.volumes.extent == "scan":
        check_whole_scans(asked.modes, asked.task)
    local = _local(asked, opened)
    check_sees_volumes(local, plan)
    with_labels = [name for name in plan.sites if not asked.label_sites or name in asked.label_sites]
    without = [name for name in plan.sites if name not in with_labels]

    sees_volumes = local.sees_volumes or bool(set(SEES_VOLUMES) & set(asked.modes))
    volumes = plan.volumes if sees_volumes else None

    def known(parts: Sequence[Part]) -> LabelledScans | None:
        return known_answers(parts, local, asked.target, asked.target_values, volumes)

    def parts_of(names: Sequence[str], which: str) -> list[Part]:
        return [(name, opened.scans[name], opened.scans[name].indices(which)) for name in names]

    def split(names: Sequence[str], which: str) -> LabelledScans | None:
        return known(parts_of(names, which))

    train, validation = split(with_labels, "train"), split(with_labels, "validation")
    if train is None:
        raise NoLabels(f"Expected training patients with {asked.target or 'labels'}; got none.")
    outside = [(name, opened.outside(name)) for name in opened.held_out]
    parts: dict[str, Sequence[Part]] = {
        "seen": parts_of(with_labels, "test"),
        "unlabelled": parts_of(without, "test"),
        "held_out": [(name, scans, range(scans.num_scans)) for name, scans in outside],
    }
    tests = {name: scans for name, own in parts.items() if (scans := known(own)) is not None}
    groups = {
        name: groups_of(known_covariates(parts[name], local, asked.target, asked.target_values))
        for name in tests
    }
    if not tests:
        raise ValueError("Expected test patients with labels; the run kept none. Set site.split_fractions.")
    settings = DownstreamSettings(
        task=asked.task,
        classes=local.classes,
        target=Target(asked.target, asked.target_values),
        spacing_mm=plan.volumes.spacing_mm,
        crop_foreground=plan.volumes.crop_foreground,
        label_counts=asked.label_counts,
        label_shares=asked.label_shares,
        draws=asked.draws,
        trained_draws=asked.trained_draws,
        modes=asked.modes,
        plan_seed=plan.seed,
        steps=asked.steps,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        anatomy_start=_start(asked, {"volume_start", "joined"} & set(asked.modes)),
        bootstrap=asked.bootstrap,
        tolerance_mm=asked.tolerance_mm,
    )
    sizes = ", ".join(f"{name} ({len(scans.patients)})" for name, scans in tests.items())
    live.say(
        f"{asked.task}, {local.classes} outputs: {len(train.patients)} patients with labels in "
        f"{', '.join(with_labels)}; tested on {sizes}"
    )
    facts: dict[str, Any] = {
        "settings": dataclasses.asdict(asked),
        "plan_sha256": plan.sha256,
        "encoder_sha256": pretrained_sha256(opened.pretrained),
        "classes": local.classes,
        "training_patients": len(train.patients),
        "validation_patients": 0 if validation is None else len(validation.patients),
    }
    federated = _federate(asked, opened, local, live) if asked.federated else None
    with live.reading("training") as progress:
        evaluated = evaluate_downstream(
            opened.pretrained,
            train,
            validation if validation is not None else train.rows([]),
            tests,
            settings,
            asked.seed,
            style_bank=opened.bank() if asked.bank else None,
            groups=groups,
            progress=progress,
        )
    rows = evaluated.rows
    if federated is not None:
        share, predictor = max(asked.label_shares), predictor_of(federated.network)
        facts["federated"] = list(federated.rounds)
        labelled = sum(
            len(own.share(share, asked.seed).patients) for n in with_labels if (own := split([n], "train"))
        )
        for name, scans in tests.items():
            fitted = Fitted("finetuned", Amount(share=share).name, labelled, (predictor,))
            rows += rows_of(fitted, scans, settings, asked.seed, name, mode="federated")
    return write_downstream(Path(asked.folder), rows, facts, evaluated.fairness)


class _Counted(RoundObserver):
    """Shows how many rounds are done."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self._show = show

    def on_round_end(
        self, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """One more is."""
        self._show(round_number)
        return {}


def _local(asked: DownstreamRunSettings, opened: FinishedRun) -> LocalFinetuning:
    """The local loop; classes are counted where they were not given."""
    classes = asked.classes or task_of(asked.task).classes(Target(asked.target, asked.target_values))
    classes = classes or max(asked.label_values.values(), default=-1) + 1
    if not classes:
        classes = num_classes(opened.scans.values())
        if not classes:
            raise NoLabels("Expected training patients with labels; no hospital has any.")
    local = LocalFinetuning(
        task=asked.task,
        classes=classes,
        label_values=asked.label_values,
        encoder=asked.encoder,
        steps=math.ceil(asked.steps / asked.rounds),
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate * (1.0 if asked.network == "tokens" else VOLUME_RATE),
        network=asked.network,
        augmentation=0.0 if asked.network == "tokens" else 1.0,
    )
    check_target(local, asked.target, asked.target_values)
    return local


def _start(asked: DownstreamRunSettings, used: object) -> AnatomyStart:
    """The start that was asked for, where something of this part starts from it."""
    return asked.anatomy_start if used else "none"


def _federate(
    asked: DownstreamRunSettings, opened: FinishedRun, local: LocalFinetuning, live: Live
) -> FinetunedRun:
    plan, start = opened.plan, _start(asked, local.sees_volumes)
    finetuning = with_noise(
        FinetunePlan(
            run_sha256=plan.sha256,
            pretrained_sha256=pretrained_sha256(opened.pretrained, local.network, start, asked.seed),
            anatomy_start=start,
            local=local,
            rounds=asked.rounds,
            seed=asked.seed,
            label_share=max(asked.label_shares),
            target=asked.target,
            target_values=asked.target_values,
            update_clip_norm=asked.update_clip_norm,
            privacy=asked.privacy,
        )
    )
    folder = Path(asked.folder) / f"federated-{finetuning.sha256[:12]}"
    with live.counting("federated rounds") as count, live.reading("in the federation") as step:

        def on_step(site: str, done: int, loss: float) -> None:
            shown = site if math.isnan(loss) else f"{site}, loss {loss:.2f}"  # noisy steps tell none
            step(shown, done, local.steps)

        client_app = make_client_app(opened.consortium.open_by_context, on_step)
        threads = opened.settings.engine.cpus_per_site
        return run_finetuning(
            InProcessGrid(FixedThreads(client_app, threads), len(plan.participants)),
            plan,
            finetuning,
            opened.pretrained,
            folder,
            observer=_Counted(lambda round_number: count(round_number, finetuning.rounds)),
        )
