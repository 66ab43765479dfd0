"""A downstream task: what is predicted, by which head, with which loss, and how a prediction is measured.

Everything that depends on what is predicted is asked of the `Task`, so that another task is another file
beside this one and a row of `tasks.py`. A task knows one answer per scan, a class, a number or a map. What
this file does not do: it knows no task, trains nothing and draws nobody.

Axes: b = scans; ... = what an answer is made of.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meduet_models.downstream.networks import PretrainedNetwork
from meduet_models.meduet import FactorNetwork, NetworkConfig

Floats = NDArray[np.float64]
Reading = Literal["code", "tokens"]
"""What of a frozen model is read: its content code, or all of its content tokens."""
Statistic = Callable[[NDArray[np.int64]], float]
"""From rows of the test scans to a number of all of them; NaN where they have none."""


@runtime_checkable
class KnownScans(Protocol):
    """What a task reads answers from (`client/latents/latent_set.py`)."""

    @property
    def has_label(self) -> Sequence[bool]:
        """Whether each scan has a label volume."""

    @property
    def covariates(self) -> Sequence[Mapping[str, str | float]]:
        """What else is known of each scan."""

    def labels(self, indices: Sequence[int], view: int = 0) -> Tensor | None:
        """Label volumes of these scans, b 1 D H W."""


@dataclass(frozen=True)
class Target:
    """What a task predicts, as a plan names it."""

    name: str = ""
    """A covariate; empty where the answer is a label volume."""
    values: tuple[str, ...] = ()
    """Of classes their names, in order; of a number the ends of its range."""


@dataclass(frozen=True)
class Metric:
    """A number that says what predictions are worth."""

    name: str
    title: str
    """What people call it, with its unit."""
    digits: int = 3
    """Digits behind the point."""
    main: bool = False
    """Whether figures and aims look at it; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid of the volumes that were encoded."""

    spacing_mm: tuple[float, float, float]
    tolerance_mm: float
    """Distance within which two surfaces agree."""


class Task(ABC):
    """One kind of prediction."""

    name: str
    """The word in plans and settings."""
    least_classes: int = 2
    """Fewest outputs that mean something."""
    per_voxel: bool
    """Whether the answer is a map on the grid of the volume."""
    metrics: tuple[Metric, ...]
    """What `measure` tells."""
    mixes: ClassVar[bool] = False
    """A scan's loss does not depend on the other scans of its batch."""

    @abstractmethod
    def check(self, classes: int, target: Target) -> None:
        """Raise `ValueError` unless this many outputs and this target belong to the task."""

    @abstractmethod
    def classes(self, target: Target) -> int:
        """Outputs that follow from the target; 0: they are counted from the labels."""

    @abstractmethod
    def words(self, target: Target) -> str:
        """What is predicted, for a person at a hospital."""

    @abstractmethod
    def known(self, scans: KnownScans, row: int, target: Target) -> bool:
        """Whether the answer of a scan is known."""

    @abstractmethod
    def answers(self, scans: KnownScans, rows: Sequence[int], target: Target) -> Tensor:
        """The answers of scans that are known, [b, ...]."""

    @abstractmethod
    def check_answers(self, answers: Tensor, classes: int) -> None:
        """Raise `ValueError` for an answer that no output stands for."""

    @abstractmethod
    def network(
        self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0
    ) -> PretrainedNetwork:
        """A head from `seed` around a copy of `network`."""

    @abstractmethod
    def loss(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """What training lowers."""

    @abstractmethod
    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """What validation compares; higher is better."""

    @abstractmethod
    def measure(
        self, outputs: Tensor, answers: Tensor, target: Target, grid: Grid
    ) -> Mapping[str, Floats | Statistic]:
        """By metric: the value of each scan (NaN: none), or a number of any rows."""

    def measure_main(
        self, outputs: Tensor, answers: Tensor, target: Target, grid: Grid
    ) -> Mapping[str, Floats | Statistic]:
        """The main metric alone, for many predictions of the same scans."""
        main = {metric.name for metric in self.metrics if metric.main}
        measured = self.measure(outputs, answers, target, grid)
        return {name: own for name, own in measured.items() if name in main}

    @abstractmethod
    def seen(self, network: FactorNetwork, reading: Reading, latents: Tensor) -> Tensor:
        """What a frozen network shows of scans, [b n k]: its tokens, or a code as one token."""

    @abstractmethod
    def fit(
        self,
        seen: Tensor,
        answers: Tensor,
        patients: Sequence[str],
        classes: int,
        config: NetworkConfig,
        seed: int,
    ) -> Callable[[Tensor], Tensor]:
        """From what is seen of scans to outputs: a closed form fitted on these scans and their patients."""


VALUES_SHOWN = 8
"""Values of labels that do not fit, in the error."""


def check_classes(answers: Tensor, classes: int) -> None:
    """Raise `ValueError` for a class that is not from 0 to `classes` - 1."""
    if len(answers) and not (0 <= int(answers.min()) and int(answers.max()) < classes):
        found: list[int] = torch.unique(answers).tolist()
        odd = next(value for value in found if not 0 <= value < classes)
        listed = ", ".join(map(str, found[:VALUES_SHOWN]))
        listed += f", … {found[-1]}" if len(found) > VALUES_SHOWN else ""
        raise ValueError(
            f"Expected classes from 0 to {classes - 1}; found {listed}. Say which values are which classes, "
            f"e.g. label_values: {{{odd}: 1}}, or set classes."
        )


def mean_of_finite(values: Floats) -> Floats:
    """Mean over the last axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    sums, counts = np.where(finite, values, 0.0).sum(-1), finite.sum(-1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def covariate_text(covariates: Mapping[str, str | float], target: str) -> str:
    """A covariate as the text that a plan names it by; empty when it is not known."""
    value = covariates.get(target, "")
    return f"{value:g}" if isinstance(value, float) else str(value)
