"""What a downstream evaluation is told, and the ways to learn from labels that it compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from federation.exchanges.finetuning import LocalFinetuning
from meduet_models.anatomy_start import AnatomyStart
from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.task import Target
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import NetworkConfig
from scans.volume_plan import VolumePlan

Mode = Literal[
    "frozen",
    "frozen_tokens",
    "finetuned",
    "label_map",
    "ridge",
    "ridge_neighbours",
    "random",
    "scratch",
    "unet",
    "unet_volume",
    "volume_unet",
    "volume_start",
    "joined",
]
"""A way to learn from labels. `unet_volume`: MONAI's U-Net on the volume; `volume_unet`: ours;
`volume_start`: ours from `anatomy_start`; `joined`: that, with content tokens of the pretrained encoder at
its deepest level; `federated` beside them is told by who fine-tuned in a federation."""
MODES: tuple[Mode, ...] = get_args(Mode)
CLOSED_FORM: tuple[Mode, ...] = (
    "frozen",
    "frozen_tokens",
    "label_map",
    "ridge",
    "ridge_neighbours",
    "random",
)
"""Those without training, for which many draws cost little."""
PRETRAINED: tuple[Mode, ...] = ("frozen", "frozen_tokens", "finetuned", "joined")
"""Those that need a pretrained encoder."""
VOLUME_KINDS: Mapping[Mode, NetworkKind] = {
    "volume_unet": "volume_unet",
    "volume_start": "volume_unet",
    "joined": "joined",
}
"""Our segmenters that are shown volumes, and their network."""
SEES_VOLUMES: tuple[Mode, ...] = ("unet_volume", *VOLUME_KINDS)
"""Those that are shown volumes."""
_AVERAGE = 0.98  # of the weights of our networks that see volumes
VOLUME_RATE = 5.0
"""Learning rate of our networks that see volumes over that of the others. Chosen on validation patients:
labels of two, 100 steps, Dice .33 at 1e-3, .66 at 3e-3, .77 at 1e-2."""


def check_whole_scans(modes: Sequence[str], task: str) -> None:
    """Raise `ValueError` for a mode that cannot read whole scans (`volumes.extent: scan`): one that is shown
    volumes, or that has a rule of its own for each place of registered crops."""
    cannot = {*SEES_VOLUMES, *(CLOSED_FORM if task_of(task).per_voxel else ())}
    if odd := [mode for mode in modes if mode in cannot]:
        why = "shown volumes" if odd[0] in SEES_VOLUMES else "fitted to each place of registered crops"
        can = ", ".join(mode for mode in MODES if mode not in cannot)
        raise ValueError(
            f"Expected modes among {can} with volumes.extent=scan and task={task}; {odd[0]} is {why}."
        )


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
    crop_foreground: float = VolumePlan.crop_foreground
    """Least share of foreground in a crop that is drawn of a whole scan."""
    label_counts: tuple[int, ...] = ()
    """Numbers of patients (of each class, of a task with classes per scan) whose labels are used; those that
    there are not enough patients for are left out."""
    label_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 1.0)
    """Shares of the training patients whose labels are used; at least one patient."""
    draws: int = 1
    """Draws of the labelled patients for what is in closed form."""
    trained_draws: int = 1
    """Draws for what is trained."""
    modes: tuple[Mode, ...] = ("frozen", "finetuned", "scratch", "unet")
    """What is compared."""
    plan_seed: int = 0
    """Seed of the plan, from which the random encoder is made."""
    steps: int = 200
    """Optimiser steps of each network."""
    batch_size: int = 8
    """Scans per step, at most."""
    learning_rate: float = 2e-3
    """Peak learning rate of each network; of ours on the volume five times that."""
    anatomy_start: AnatomyStart = "none"
    """What `volume_start` and `joined` start from."""
    bootstrap: int = 1000
    """Resamples of the patients, for the intervals."""
    tolerance_mm: float = 1.0
    """Distance within which two surfaces agree, for surface Dice."""
    network: NetworkConfig | None = None
    """The encoder of `scratch` where no pretrained model is given, which is what it copies otherwise."""

    def __post_init__(self) -> None:
        """Refuse draws of nobody."""
        if min(self.draws, self.trained_draws) < 1 or min(self.label_counts, default=1) < 1:
            raise ValueError("Expected draws, trained_draws and every one of label_counts to be at least 1.")

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
        """The same for one mode: our networks on the volume get it augmented, and their weights averaged."""
        if mode not in VOLUME_KINDS:
            return self.local
        rate = VOLUME_RATE * self.learning_rate
        return replace(
            self.local, network=VOLUME_KINDS[mode], learning_rate=rate, augmentation=1.0, average=_AVERAGE
        )
