"""Anatomy probes: how much anatomy can be predicted from content, and how much of content from style.

Ridge regression, nested cross-validation by patient, R² on patients not fitted: 1 is perfect, 0 is as good
as the mean of the patients that were fitted, below 0 is worse. What this file does not do: it measures no
anatomy (`simulations/hospitals/held_out.py`), and reads no sums (`probe_sums.py`: the same for pooled
vectors).

Axes: b = scans, k = features, t = targets, p = penalties, s = style channels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from meduet_models.probes.cross_validation import Array, Index, Split, nested, patient_folds

RIDGE_PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""On features of mean squared length 1, beside a mean squared error; strongest first."""


def anatomy_probe(
    features: Float[Tensor, "b k"], anatomy: Float[Tensor, "b t"], patients: Sequence[str], seed: int
) -> Float[Tensor, " t"]:
    """Out-of-fold R² of each anatomical target; a target is read from the scans where it is known (not NaN).

    NaN where a target cannot be read: known of fewer than three patients, or the same for all.
    """
    known = ~torch.isnan(anatomy)
    read = torch.full((anatomy.shape[1],), torch.nan, dtype=torch.float64)
    for pattern in torch.unique(known.T, dim=0):
        columns = (known.T == pattern).all(1).nonzero()[:, 0]
        rows = pattern.nonzero()[:, 0]
        who = [patients[int(row)] for row in rows]
        if len(set(who)) < 3:
            continue
        error, spread = out_of_fold(_array(features[rows]), _array(anatomy[rows][:, columns]), who, seed)
        varies = spread > 1e-12
        read[columns[torch.from_numpy(varies)]] = torch.from_numpy(1 - error[varies] / spread[varies])
    return read


def content_through_style(
    content: Float[Tensor, "b k"], style: Float[Tensor, "b s"], patients: Sequence[str], seed: int
) -> float:
    """Share of the variance of pooled content that pooled style predicts, out of fold.

    Channels weighted by their variance. 0 is the aim; some of it is the site, which both may know.
    """
    error, spread = out_of_fold(_array(style), _array(content), patients, seed, together=True)
    return float(1 - error.sum() / max(spread.sum(), 1e-12))


def out_of_fold(
    x: Array, y: Array, patients: Sequence[str], seed: int, together: bool = False, folds: Index | None = None
) -> tuple[Array, Array]:
    """Squared errors on unseen patients, and those of the fitted patients' mean, summed over rows, [t] each.

    `together` chooses one penalty for all targets (by their summed error), else each target has its own.
    `folds` replaces the folds drawn from `seed`.
    """
    error, spread = np.zeros(y.shape[1]), np.zeros(y.shape[1])
    for outer, inner in nested(x, patient_folds(patients, seed) if folds is None else folds):
        wrong = np.sum([_errors(part, y) for part in inner], axis=0)  # p t
        if together:
            wrong = np.repeat(wrong.sum(1, keepdims=True), y.shape[1], axis=1)
        chosen = wrong.argmin(0)
        error += _errors(outer, y)[chosen, np.arange(y.shape[1])]
        spread += ((y[outer.test] - y[outer.train].mean(0)) ** 2).sum(0)
    return error, spread


def _errors(part: Split, y: Array) -> NDArray[np.float64]:
    """Squared errors on the test rows, [p t]; the columns of `z_train` are orthogonal."""
    mean = y[part.train].mean(0)
    power = (part.z_train**2).mean(0)[:, None]
    moment = part.z_train.T @ (y[part.train] - mean) / len(part.train)
    left = y[part.test] - mean
    errors = [((left - part.z_test @ (moment / (power + p))) ** 2).sum(0) for p in RIDGE_PENALTIES]
    return np.stack(errors)


def _array(values: Tensor) -> Array:
    array: Array = values.detach().double().cpu().numpy()
    return array
