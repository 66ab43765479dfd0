"""Cross-validation by patient: who is in which fold, and a fold's features in the basis of its training rows.

One nested scheme everywhere: a fold is tested by a probe fitted on the others, whose penalty was chosen by
leaving out each of those others in turn. No row of a patient is ever on both sides. Features of any width are
rotated into the span of the training rows (a penalty on the squared norm does not see the rotation), so that
9,216 features of 150 scans cost what 150 features cost.

What this file does not do: it fits nothing (`nested_probes.py`, `anatomy_probes.py`).

Axes: b = rows (scans), r = training rows' rank, k = features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOLDS = 5
Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Training and test rows, and their features in the basis of the training rows."""

    train: Index
    """Rows fitted on."""
    test: Index
    """Rows read."""
    z_train: Array
    """[train r]: standardised features, of mean squared length 1, rotated."""
    z_test: Array
    """[test r]: the same map applied to the rows that are read."""


def patient_folds(
    patients: Sequence[str], seed: int, num_folds: int = FOLDS, strata: Sequence[int] | None = None
) -> Index:
    """The fold of each row, all rows of a patient together; as even as possible within each stratum.

    A patient belongs to the stratum of her first row. With fewer patients than folds there are as many folds
    as patients. Raises `ValueError` with fewer than three patients: nothing could be chosen on the inside.
    """
    first: dict[str, int] = {}
    for row, patient in enumerate(patients):
        first.setdefault(patient, row)
    if len(first) < 3:
        raise ValueError(f"Expected at least three patients to cross-validate; got {len(first)}.")
    names = sorted(first)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    if strata is not None:
        order.sort(key=lambda name: strata[first[name]])
    num_folds = min(num_folds, len(order))
    fold_of = {name: place % num_folds for place, name in enumerate(order)}
    return np.array([fold_of[patient] for patient in patients], dtype=np.int64)


def split(x: Array, folds: Index, test: int, without: int | None = None) -> Split:
    """Rows of fold `test` against all others, except those of fold `without`, which take no part."""
    read = np.flatnonzero(folds == test)
    fitted = np.flatnonzero((folds != test) & (folds != (-1 if without is None else without)))
    mean, deviation = x[fitted].mean(0), x[fitted].std(0)
    varies = deviation > 1e-12
    scale = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0) / np.sqrt(max(1, int(varies.sum())))
    seen, unseen = (x[fitted] - mean) * scale, (x[read] - mean) * scale
    values, vectors = np.linalg.eigh(seen @ seen.T)
    kept = values > max(1e-12, 1e-10 * float(values[-1]))
    if not kept.any():
        return Split(fitted, read, np.zeros((len(fitted), 1)), np.zeros((len(read), 1)))
    vectors, length = vectors[:, kept], np.sqrt(values[kept])
    return Split(fitted, read, vectors * length, unseen @ (seen.T @ vectors) / length)


def nested(x: Array, folds: Index) -> Iterator[tuple[Split, list[Split]]]:
    """Each fold's outer split, and the inner splits among the other folds."""
    names = np.unique(folds).tolist()
    for outer in names:
        inner = [split(x, folds, other, without=outer) for other in names if other != outer]
        yield split(x, folds, outer), inner
