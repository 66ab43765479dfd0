"""Classification: a class per scan, which a covariate names.

The head is a linear map of pooled content, trained with cross-entropy; a frozen model is read by logistic
regression from its content code or tokens (`frozen.py`). Measured by the area under the ROC curve.

Axes: b = scans.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meduet_models.downstream.frozen import fit_classes, frozen_features
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
    check_classes,
    covariate_text,
)
from meduet_models.meduet import FactorNetwork, NetworkConfig


class Classification(Task):
    """A class per scan."""

    name = "classification"
    per_voxel = False
    metrics = (Metric("auc", "AUC", main=True),)

    def check(self, classes: int, target: Target) -> None:
        """A covariate, with a value for each class."""
        if not target.name or len(set(target.values)) != classes:
            raise ValueError(
                f"Expected task=classification to name a target covariate and its {classes} values; got "
                f"{target.name or 'none'} with {', '.join(target.values) or 'none'}."
            )

    def classes(self, target: Target) -> int:
        """As many as values."""
        return len(target.values)

    def words(self, target: Target) -> str:
        """The covariate, and which values it has."""
        return f"{target.name!r} of every scan ({', '.join(target.values)})"

    def known(self, scans: KnownScans, row: int, target: Target) -> bool:
        """Where the covariate is one of the values."""
        return covariate_text(scans.covariates[row], target.name) in target.values

    def answers(self, scans: KnownScans, rows: Sequence[int], target: Target) -> Int64[Tensor, " b"]:
        """Places among the values."""
        return torch.tensor(
            [target.values.index(covariate_text(scans.covariates[row], target.name)) for row in rows]
        )

    def check_answers(self, answers: Tensor, classes: int) -> None:
        """Classes from 0."""
        check_classes(answers, classes)

    def network(
        self, network: FactorNetwork, classes: int, *, trainable: bool, seed: int = 0
    ) -> PooledNetwork:
        """A linear map of pooled content."""
        return PooledNetwork(network, classes, trainable=trainable, seed=seed)

    def loss(self, outputs: Float[Tensor, "b classes"], answers: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """Cross-entropy."""
        return F.cross_entropy(outputs, answers)

    def score(self, outputs: Tensor, answers: Tensor) -> float:
        """Minus cross-entropy."""
        return -float(F.cross_entropy(outputs, answers))

    def measure(
        self, outputs: Tensor, answers: Tensor, target: Target, grid: Grid
    ) -> Mapping[str, Floats | Statistic]:
        """Area under the ROC curve (of class 1; with more classes the mean of each against the rest)."""
        scores, truth = outputs.double().numpy(), answers.numpy()
        return {"auc": lambda rows: _auc(scores[rows], truth[rows])}

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
        """Logistic regression: probabilities of the classes."""
        fitted = fit_classes(seen.flatten(1), answers, classes, patients, seed)
        return lambda unseen: fitted(unseen.flatten(1))


def _auc(scores: Floats, truth: NDArray[np.int64]) -> float:
    present = np.unique(truth)
    if len(present) < 2:
        return float("nan")
    if scores.shape[1] == 2:
        return _auc_of(scores[:, 1], truth == 1)
    return float(np.mean([_auc_of(scores[:, one], truth == one) for one in present]))


def _auc_of(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """The share of pairs in the right order, ties counted half (Mann and Whitney)."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[places]
    hits = int(positive.sum())
    above = float(rank[positive].sum()) - hits * (hits + 1) / 2
    return above / (hits * (len(scores) - hits))
