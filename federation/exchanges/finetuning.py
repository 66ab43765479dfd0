"""Federated fine-tuning: the agreement and the question; the answer is that of every round, a `TrainReply`.

`FinetunePlan` names the run by its plan's hash and the pretrained encoder by its own, so that no site adds
labels to a model that is not the agreed one; it is as frozen and hashed as `RunPlan`. Both travel with every
question. Does not do: train (`client/training/finetuning.py`), ask (`server/exchanges/finetuning.py`).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from federation.exchanges.exchange import Exchange
from federation.exchanges.pretraining import TrainReply
from federation.plan.diffusion_plan import MOST_STEPS
from federation.plan.finetuning_privacy import FinetunePrivacy, contradictions, round_promise
from federation.plan.plan import RunPlan
from federation.wire.limits import largest_reply
from federation.wire.messages import Ask
from federation.wire.wire import MessageError, RefusalKind, Tensors
from forms.form import build, check
from forms.json_text import canonical, read_json, sha256_of
from forms.names import OptionalPhrase, Phrase, Sha256
from forms.ranges import Entries, Range, Share
from meduet_models.anatomy_start import AnatomyStart
from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.task import Target
from privacy.promise import Promise


@dataclass(frozen=True, kw_only=True)
class LocalFinetuning:
    """The local loop: the same alone and in a federation."""

    task: Phrase
    """What is predicted: the name of a downstream task (`meduet_models/downstream/tasks.py`)."""
    classes: Annotated[int, Range(at_least=1, at_most=1000)]
    """Classes, the background of a segmentation included; 1 for a number."""
    label_values: Annotated[dict[int, int], Entries(1000)] = field(default_factory=dict)
    """Segmentation: values of label files and the classes that they become (`{255: 1}`); every other value is
    background. Empty: the values are the classes."""
    network: NetworkKind = "tokens"
    """What predicts: a head on content tokens and latents; `volume_unet`: a U-Net on the volume, segmentation
    only; `joined`: that U-Net with content tokens at its deepest level."""
    encoder: Literal["frozen", "finetuned"] = "finetuned"
    """Whether the encoder stays as it came."""
    steps: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 200
    """Optimiser steps; in a federation, of each round."""
    batch_size: Annotated[int, Range(at_least=1, at_most=4096)] = 8
    """Scans per step, at most; fewer where fewer patients have labels."""
    learning_rate: Annotated[float, Range(above=0, at_most=10)] = 2e-3
    """Peak learning rate; it rises over the first steps and falls to 0 with a cosine."""
    warmup: Annotated[float, Share] = 0.05
    """Share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Range(at_least=0, at_most=10)] = 1e-2
    """AdamW weight decay, of matrices and convolutions."""
    gradient_clip_norm: Annotated[float, Range(above=0, at_most=1_000_000)] = 1.0
    """L2 norm to which the batch gradient is clipped (no privacy meaning)."""
    augmentation: Annotated[float, Range(at_least=0, at_most=2)] = 0.0
    """How much volumes are moved and rendered anew at each step; 0: not at all, 1: about as nnU-Net does."""
    average: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Momentum of the moving average of the weights, which is what is kept; 0: the last weights are."""

    @property
    def sees_volumes(self) -> bool:
        """Whether the network is shown prepared volumes."""
        return self.network != "tokens"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        from meduet_models.downstream.tasks import task_of  # MONAI takes seconds to import

        check(self, "finetuning.local")
        if self.classes < (least := task_of(self.task).least_classes):
            raise ValueError(
                f"Expected classes to be at least {least} with task={self.task}; got {self.classes}."
            )
        if self.sees_volumes and self.task != "segmentation":
            raise ValueError(f"network={self.network} segments: with task={self.task} use network=tokens.")
        if self.augmentation and not self.sees_volumes:
            raise ValueError(
                "augmentation has no effect with network=tokens, which sees latents: set it to 0."
            )
        if self.label_values and self.task != "segmentation":
            raise ValueError(f"label_values has no effect with task={self.task}: leave it out.")
        for value, label in self.label_values.items():
            if not (0 <= label < self.classes and -(2**15) <= value < 2**15):
                raise ValueError(
                    f"Expected label_values to give classes from 0 to {self.classes - 1} to values that fit "
                    f"int16; got {value}: {label}."
                )


@dataclass(frozen=True, kw_only=True)
class FinetunePlan:
    """What a site is told before it fine-tunes with its labels."""

    run_sha256: Sha256
    """Hash of the plan of the run that pretrained the encoder."""
    pretrained_sha256: Sha256
    """Hash of the encoder's tensors as they are before round 1; of a U-Net on the volume, of its start."""
    local: LocalFinetuning
    """The local loop."""
    rounds: Annotated[int, Range(at_least=1, at_most=100_000)] = 5
    """Rounds."""
    anatomy_start: AnatomyStart = "none"
    """What a U-Net on the volume starts from: `canonical`, public anatomy that never was a patient; `shapes`,
    its control; `none`, the seed."""
    seed: Annotated[int, Range(at_least=0, at_most=2**63 - 1)] = 0
    """Seed of every draw: heads, labelled patients, batches."""
    label_share: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Share of a site's labelled training patients whose labels are used."""
    target: OptionalPhrase = ""
    """The covariate to predict, of a task that predicts one."""
    target_values: Annotated[tuple[Phrase, ...], Entries(1000)] = ()
    """Its values, in the order of the classes; of a number the ends of its range."""
    update_clip_norm: Annotated[float, Range(above=0, at_most=10_000)] = 20.0
    """L2 norm to which a site's mean update is clipped at the gate."""
    privacy: FinetunePrivacy | None = None
    """Differential privacy for each patient, with noise in each step; none: what leaves is exact."""

    @property
    def named(self) -> Target:
        """What is predicted, as the task takes it."""
        return Target(self.target, self.target_values)

    def __post_init__(self) -> None:
        """Refuse a plan out of its ranges, or one that contradicts itself."""
        check(self, "finetuning")
        if (steps := self.rounds * self.local.steps) > MOST_STEPS:
            raise ValueError(
                f"Expected finetuning.rounds times finetuning.local.steps to be at most {MOST_STEPS:,}; got "
                f"{steps:,}."
            )
        check_target(self.local, self.target, self.target_values)
        check_start(self.local, self.anatomy_start)
        if self.privacy is not None and (wrong := next(contradictions(self), "")):
            raise ValueError(wrong)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces; what is hashed."""
        return canonical(dataclasses.asdict(self))

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON, 64 hex digits."""
        return sha256_of(self.to_json())

    @staticmethod
    def from_json(text: str) -> "FinetunePlan":
        """Rebuild a plan; what is unknown, missing, ill-typed or out of range raises `ValueError`."""
        return build(FinetunePlan, read_json(text, "a fine-tuning plan"), "finetuning")


def check_target(local: LocalFinetuning, target: str, values: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the outputs and the target are ones of the task."""
    from meduet_models.downstream.tasks import task_of  # MONAI takes seconds to import

    task_of(local.task).check(local.classes, Target(target, values))


def check_start(local: LocalFinetuning, anatomy_start: AnatomyStart) -> None:
    """Raise `ValueError` for a start from anatomy of a network that has none."""
    if anatomy_start != "none" and not local.sees_volumes:
        raise ValueError(
            f"anatomy_start={anatomy_start} has no effect with network={local.network}, which has no U-Net "
            "on the volume: leave it out."
        )


def check_sees_volumes(local: LocalFinetuning, plan: RunPlan) -> None:
    """Raise `ValueError` for a network that is shown volumes, of a run on whole scans: only crops are kept as
    volumes."""
    if local.sees_volumes and plan.volumes.extent == "scan":
        raise ValueError(
            f"Expected network=tokens with volumes.extent=scan; network={local.network} is shown volumes, "
            "and of whole scans only latents are kept."
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneAsk(Ask, kind="finetune_ask"):
    """One round of fine-tuning from these weights: `shared` changes and travels back, `fixed` does not. The
    answer is a `TrainReply` under the fine-tuning's hash."""

    finetuning_json: str
    round: int
    shared: Tensors
    fixed: Tensors

    def finetuning(self, plan: RunPlan) -> FinetunePlan:
        """The fine-tuning that is asked for; raises `MessageError` unless it is one of `plan`, in its own
        words."""
        try:
            finetuning = FinetunePlan.from_json(self.finetuning_json)
        except ValueError as error:
            raise MessageError(str(error), RefusalKind.PLAN_NOT_ACCEPTED) from error
        if finetuning.to_json() != self.finetuning_json:
            raise MessageError("Expected the canonical JSON of a fine-tuning plan; got other words.")
        if finetuning.run_sha256 != plan.sha256:
            raise MessageError(
                f"Expected a fine-tuning of run {plan.sha256[:12]}; it is one of "
                f"{finetuning.run_sha256[:12]}.",
                RefusalKind.PLAN_NOT_ACCEPTED,
            )
        return finetuning


def finetuning_promise(plan: RunPlan, ask: FinetuneAsk) -> Promise:
    """A site's mean update is clipped at the gate; with privacy each patient's share of a step is cut before
    that, and noise added. Raises as `FinetuneAsk.finetuning`."""
    finetuning = ask.finetuning(plan)
    if finetuning.privacy is not None:
        return round_promise(finetuning)
    bound = finetuning.update_clip_norm
    return Promise(kind="finetuning", bound=bound, unit="site update", enforcement="clip")


UNMASKED = (
    "A fine-tuning sends each site's update unmasked, and its run has aggregation.secure_sum=true: fine-tune "
    "at one site, or pretrain without secure sums."
)


def agreed(plan: RunPlan, ask: FinetuneAsk) -> tuple[str, range]:
    """Hash and rounds of the fine-tuning. Raises as `FinetuneAsk.finetuning`, and `ValueError` under a plan
    whose updates leave in secure sums only."""
    if plan.aggregation.secure_sum:
        raise ValueError(UNMASKED)
    finetuning = ask.finetuning(plan)
    return finetuning.sha256, range(1, finetuning.rounds + 1)


FINETUNING = Exchange(
    route="train.finetune",
    ask=FinetuneAsk,
    reply=TrainReply,
    rounds=lambda plan: range(0),  # a fine-tuning is an agreement of its own, and says its rounds
    agreement=agreed,
    largest=lambda plan, ask: largest_reply(ask.shared),
    promise=finetuning_promise,
)
