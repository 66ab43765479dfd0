"""Downstream tasks: the shapes that the benchmark speaks in. The tasks themselves are not in this version.

Axes: b = scans, c d h w = latents, D H W = voxels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor

from meduet_models.meduet import FactorNetwork

Mode = Literal["frozen", "finetuned", "scratch", "unet"]


@dataclass(frozen=True)
class LabelledScans:
    """Scans with what is to be predicted."""

    latents: Float[Tensor, "b c d h w"]
    """Their latents."""
    labels: Int64[Tensor, "b 1 D H W"] | None
    """Label volumes (segmentation)."""
    target: Int64[Tensor, " b"] | None
    """Classes (classification)."""
    patient: tuple[str, ...]
    """Patient of each."""
    site: tuple[int, ...]
    """Hospital of each."""


@dataclass(frozen=True, kw_only=True)
class DownstreamSettings:
    """A downstream task."""

    task: Literal["segmentation", "classification"]
    """Kind of task."""
    classes: int
    """Classes, background included."""
    spacing_mm: tuple[float, float, float]
    """Voxel spacing."""
    label_shares: tuple[float, ...]
    """Shares of the training patients whose labels are used."""
    modes: tuple[Mode, ...]
    """What is trained."""
    steps: int
    """Optimiser steps."""


@dataclass(frozen=True)
class DownstreamRow:
    """One number, with its bootstrap interval over patients."""

    task: str
    mode: str
    label_share: float
    test: str
    metric: str
    value: float
    low: float
    high: float
    patients: int


def evaluate_downstream(
    model: FactorNetwork | None,
    train: LabelledScans,
    validation: LabelledScans,
    tests: Mapping[str, LabelledScans],
    settings: DownstreamSettings,
    seed: int,
) -> list[DownstreamRow]:
    """Not in this version: raises `NotImplementedError`."""
    raise NotImplementedError("Expected no downstream tasks in this version: set tasks to [].")
