"""Regression: a number per scan, such as age, which a covariate holds.

A plan names the range [low, high] that is mapped to [-1, 1], so that all sites mean the same by an output;
numbers beyond it are cut off. The head is a linear map of pooled content, trained with squared error; a
frozen model is read by ridge regression from its content code or tokens (`frozen.py`). Measured by the mean
absolute error, in the covariate's own unit, and by R².

Axes: b = scans.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from meduet_models.downstream.frozen import fit_number, frozen_features
from meduet_models.downstream.networks import PooledNetwork
from meduet_models.downstream.task import (
    Floats,
    Grid,
    KnownScans,
    Metric,
    Reading,
    Statistic,
    Target,
    Task,
    covariate_text,
)
from meduet_models.meduet import FactorNetwork, NetworkConfig


class Regression(Task):
    """A number per scan."""

    name = "regression"
    least_classes = 1
    per_voxel = False
    metrics = (Metric("r2", "R²", main=True), Metric("mae", "mean absolute error", digits=2))

    def check(self, classes: int, target: Target) -> None:
        """One output, and a covariate with the ends of its range."""
        if classes != 1:
            raise ValueError(f"Expected classes to be 1 with task=regression, a number; got {classes}.")
        if not target.name:
            raise ValueError("Expected task=regression to name a target covariate; got none.")
        _range(target)

    def classes(self, target: Target) -> int:
        """One."""
        return 1

    def words(self, target: Target) -> str:
        """The covariate, and its range."""
        low, high = _range(target)
        return f"{target.name!r} of every scan, a number from {low:g} to {high:g}"

    def known(self, scans: KnownScans, row: int, target: Target) -> bool:
        """Where the covariate is a number."""
        return math.isfinite(_number(scans, row, target))

    def answers(self, scans: KnownScans, rows: Sequence[int], target: Target) -> Float32[Tensor, " b"]:
        """The numbers, their range mapped to [-1, 1]."""
        low, high = _range(target)
        numbers = torch.tensor([_number(scans, row, target) for row in rows], dtype=torch.float64)
        return ((2 * numbers - low - high) / (high - low)).clamp(-1, 1).float()

    def check_answers(self, answers: Tensor, classes: int) -> None:
        """Every number is one that an output stands for: cut off where it was read."""

    def network(
        self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0
    ) -> PooledNetwork:
        """A linear map of pooled content."""
        return PooledNetwork(network, classes, trainable=trainable, seed=seed)

    def loss(self, outputs: Float[Tensor, "b 1"], answers: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """Squared error."""
        return F.mse_loss(outputs[:, 0], answers)

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Minus squared error."""
        return -float(F.mse_loss(outputs[:, 0], answers))

    def measure(
        self, outputs: Tensor, answers: Tensor, target: Target, grid: Grid
    ) -> Mapping[str, Floats | Statistic]:
        """Absolute error of each scan, in the unit of the covariate; R² of any rows."""
        low, high = _range(target)
        predicted, truth = outputs[:, 0].double().clamp(-1, 1).numpy(), answers.double().numpy()
        error = np.abs(predicted - truth) * (high - low) / 2
        return {"r2": lambda rows: _r2(predicted[rows], truth[rows]), "mae": error}

    def seen(self, network: FactorNetwork, reading: Reading, latents: Tensor) -> Tensor:
        """The code, or all tokens side by side, as one token."""
        return frozen_features(network, latents, reading).unsqueeze(1)

    def fit(
        self,
        seen: Tensor,
        answers: Tensor,
        patients: Sequence[str],
        classes: int,
        config: NetworkConfig,
        seed: int,
    ) -> Callable[[Tensor], Tensor]:
        """Ridge regression."""
        fitted = fit_number(seen.flatten(1), answers, patients, seed)
        return lambda unseen: fitted(unseen.flatten(1))


def _range(target: Target) -> tuple[float, float]:
    """The ends of the range; raises `ValueError` when the values are no range."""
    try:
        low, high = (float(value) for value in target.values)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError
    except ValueError:
        raise ValueError(
            "Expected target_values to be the lowest and the highest number, as [20, 90], with "
            f"task=regression; got {', '.join(target.values) or 'none'}."
        ) from None
    return low, high


def _number(scans: KnownScans, row: int, target: Target) -> float:
    """The covariate of a scan; NaN where it is not known, or no number."""
    try:
        return float(covariate_text(scans.covariates[row], target.name))
    except ValueError:
        return math.nan


def _r2(predicted: Floats, truth: Floats) -> float:
    spread = float(np.square(truth - truth.mean()).sum())
    return 1 - float(np.square(predicted - truth).sum()) / spread if spread > 0 else math.nan
