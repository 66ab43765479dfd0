"""Probes: how much of the site is in content, how much of the patient; read with fresh classifiers.

The network's own site classifier is a weak attacker that training has taught to fail. So each reading trains
a new one, on features of other patients than it is tested on. Retrieval is reported beside it: content that
forgot the patient also has no site in it.

What this file does not do: it trains nothing of the network and chooses nothing; what is measured on a small
cohort is reported with its chance level, not with a verdict.

Axes: b = scans (or views of scans), k = features, q = queries, g = gallery, n = patients, v = style
statistics.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold
from torch import Tensor

from meduet_models.erasure import ErasureMoments

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


def linear_probe_from_sums(
    moments: Mapping[str, ErasureMoments], shrinkage: float = 0.05
) -> tuple[Float64[Tensor, "k s"], Float64[Tensor, " s"]]:
    """The linear site probe of a federation, from the sites' sums alone: weight and bias, sites in mapping
    order.

    Linear discriminant with equal priors and the pooled within-site covariance (shrunk towards its mean
    variance). It equals the probe fitted on all features in one place: no feature needs to travel. Each site
    then counts its own hits on held-out scans with `read_site`.
    """
    if len(moments) < 2 or any(own.count < 1 for own in moments.values()):
        raise ValueError(f"Expected content sums of at least two sites with patients; got {len(moments)}.")
    means = torch.stack([own.total / own.count for own in moments.values()], dim=1)  # k s
    within = torch.stack(
        [
            own.outer / own.count - torch.outer(mean, mean)
            for own, mean in zip(moments.values(), means.T, strict=True)
        ]
    ).mean(0)
    spread = within.diagonal().mean().clamp(min=1e-12)
    within = (1 - shrinkage) * within + shrinkage * spread * torch.eye(len(means), dtype=torch.float64)
    weight = torch.linalg.lstsq(within, means, driver="gelsd").solution
    return weight, -0.5 * (means * weight).sum(0)


def read_site(
    features: Float[Tensor, "b k"], weight: Float[Tensor, "k s"], bias: Float[Tensor, " s"]
) -> Int[Tensor, " b"]:
    """The site that a linear probe reads from each feature vector."""
    return (features.to(weight) @ weight + bias).argmax(1)


def patient_retrieval(
    queries: Float[Tensor, "q k"],
    gallery: Float[Tensor, "g k"],
    query_patients: Sequence[str],
    gallery_patients: Sequence[str],
    centred: bool = False,
) -> ProbeReading:
    """Share of queries whose nearest gallery vector (cosine) is of the same patient; chance by guessing
    uniformly.

    Queries and gallery are different renderings of the same patients: other scanners, or other views.
    `centred` subtracts the mean of each side first, which hides a shift between scanners. A query whose
    patient is not in the gallery is not asked. Raises `ValueError` when none can be.
    """
    same = torch.from_numpy(np.asarray(query_patients)[:, None] == np.asarray(gallery_patients)[None])  # q g
    asked = same.any(1)
    if not bool(asked.any()):
        raise ValueError("Expected queries of patients that are in the gallery; got none.")
    if centred:
        queries, gallery = queries - queries.mean(0), gallery - gallery.mean(0)
    similarity = F.normalize(queries.detach().cpu(), dim=1) @ F.normalize(gallery.detach().cpu(), dim=1).T
    hits = same[torch.arange(len(same)), similarity.argmax(1)][asked]
    return ProbeReading(float(hits.float().mean()), float(same[asked].float().mean()))


def retrieval_across_sites(
    features: Float[Tensor, "b k"], sites: Sequence[int], patients: Sequence[str], centred: bool = False
) -> ProbeReading:
    """`patient_retrieval` averaged over ordered pairs of sites that have patients in common (simulated
    scanners).
    """
    labels, names = np.asarray(sites), np.asarray(patients)
    readings = []
    for a in np.unique(labels):
        for b in np.unique(labels):
            here, there = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            if a != b and set(names[here]) & set(names[there]):
                readings.append(
                    patient_retrieval(
                        features[torch.from_numpy(here)],
                        features[torch.from_numpy(there)],
                        list(names[here]),
                        list(names[there]),
                        centred,
                    )
                )
    if not readings:
        raise ValueError("Expected patients that were scanned at two sites; got none.")
    return ProbeReading(
        float(np.mean([r.score for r in readings])), float(np.mean([r.chance for r in readings]))
    )


def style_gap_closed(
    swapped: Float[Tensor, " v"], source: Float[Tensor, " v"], target: Float[Tensor, " v"]
) -> float:
    """Share of the distance between two sites' style statistics that a swap has covered.

    1 - ||swapped - target|| / ||source - target||: 1 is perfect, 0 did nothing, below 0 made it worse. The
    vectors are `StyleEntry.to_vector()` of the swapped scans, of the site they come from and of the site they
    go to.
    """
    return 1 - float((swapped - target).norm() / (source - target).norm().clamp(min=1e-12))


def counterfactual_ratio(
    swapped: Float[Tensor, " *axes"], source: Float[Tensor, " *axes"], truth: Float[Tensor, " *axes"]
) -> float:
    """Squared error of swapped scans against the same anatomy on the target's scanner, relative to doing
    nothing.

    ||swapped - truth||² / ||source - truth||²: 0 is perfect, 1 did nothing. Needs simulated scanners, or
    patients scanned at both sites.
    """
    return float((swapped - truth).square().sum() / (source - truth).square().sum().clamp(min=1e-12))
