"""The quick site probe: how much of the site is in content or style, read with a fresh classifier.

The network's own site classifier is a weak attacker that training has taught to fail. So each reading trains
a new one, on features of other patients than it is tested on. This one has fixed penalties and is quick
enough for every few rounds; `nested_probes.py` has the one for the table, with its null. Beside it stands
recognition (`recognition.py`): content that forgot the patient also has no site in it.

What this file does not do: it trains nothing of the network and chooses nothing; what is measured on a small
cohort is reported with its chance level, not with a verdict.

Axes: b = scans (or views of scans), k = features.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

FOLDS = 5
_MLP_WIDTH, _MLP_STEPS, _MLP_DECAY = 64, 200, 1e-2


@dataclass(frozen=True)
class ProbeReading:
    """What a probe read, beside what it would read by guessing."""

    score: float
    """Balanced accuracy, or share of queries retrieved."""
    chance: float
    """The same by guessing."""


def site_probe(
    features: Float[Tensor, "b k"],
    sites: Sequence[int],
    patients: Sequence[str],
    seed: int,
    probe: Literal["linear", "mlp"] = "linear",
) -> ProbeReading:
    """Balanced accuracy of a fresh probe that reads the site, over patients it has not seen.

    Folds are made of patients, so two views of a patient (or the same anatomy on two scanners) never sit on
    both sides. Chance is 1 / sites. Raises `ValueError` with fewer than two sites or two patients.
    """
    from sklearn.metrics import balanced_accuracy_score  # seconds to import, and sites never come here
    from sklearn.model_selection import GroupKFold

    labels, groups = np.asarray(sites), np.asarray(patients)
    names, labels = np.unique(labels, return_inverse=True)
    num_patients = len(np.unique(groups))
    if len(names) < 2 or num_patients < 2:
        raise ValueError(
            f"Expected two sites and two patients to probe; got {len(names)} and {num_patients}."
        )
    x = features.detach().double().cpu().numpy()
    said = np.empty_like(labels)
    folds = GroupKFold(n_splits=min(FOLDS, num_patients), shuffle=True, random_state=seed)
    for train, test in folds.split(x, labels, groups):
        said[test] = _fit_predict(x[train], labels[train], x[test], probe, seed)
    return ProbeReading(float(balanced_accuracy_score(labels, said)), 1 / len(names))


def _fit_predict(
    x: NDArray[np.float64], y: NDArray[np.int64], unseen: NDArray[np.float64], probe: str, seed: int
) -> NDArray[np.int64]:
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y)) == 1:
        return np.full(len(unseen), y[0])
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation < 1e-12] = 1.0
    x, unseen = (x - mean) / deviation, (unseen - mean) / deviation
    if probe == "mlp":
        return _mlp(x, y, unseen, seed)
    linear = LogisticRegression(C=0.1, class_weight="balanced", max_iter=5000)
    prediction: NDArray[np.int64] = linear.fit(x, y).predict(unseen)
    return prediction


def _mlp(
    x: NDArray[np.float64], y: NDArray[np.int64], unseen: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """One hidden layer, full batch, AdamW; weights drawn from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(y.max()) + 1
    sizes = (x.shape[1], _MLP_WIDTH, num_classes)
    weights = [
        (torch.randn(i, o, generator=generator) / math.sqrt(i)).requires_grad_()
        for i, o in itertools.pairwise(sizes)
    ]
    biases = [torch.zeros(o, requires_grad=True) for o in sizes[1:]]

    def logits(values: NDArray[np.float64]) -> Tensor:
        hidden = F.gelu(torch.from_numpy(values).float() @ weights[0] + biases[0])
        return hidden @ weights[1] + biases[1]

    target = torch.from_numpy(y)
    balance = 1 / torch.bincount(target, minlength=num_classes).clamp(min=1).float()
    optimiser = torch.optim.AdamW([*weights, *biases], lr=1e-2, weight_decay=_MLP_DECAY)
    with torch.enable_grad():
        for _ in range(_MLP_STEPS):
            loss = F.cross_entropy(logits(x), target, weight=balance)
            leaves = [*weights, *biases]
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient
            optimiser.step()
    with torch.no_grad():
        prediction: NDArray[np.int64] = logits(unseen).argmax(1).numpy()
    return prediction
