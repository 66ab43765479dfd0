"""Site probes to be reported: nested cross-validation by patient, and the null that permuted labels give.

`site_probe` (`probes.py`) is quick enough for every few rounds; this one is for the table. The penalty is
chosen inside, the p-value comes from the very same procedure on permuted sites: in patients seen at several
sites the site labels are permuted within each patient, all others exchange their site with each other. All
permutations are fitted at once.

What this file does not do: it makes no features, and names no verdict.
Source: multinomial logistic regression by the fixed upper bound on its curvature (Böhning 1992) with
Nesterov's acceleration; p-values as in Phipson and Smyth 2010 (the observed labelling is one of the draws).

Axes: b = scans, k = features, n = tokens, l = labellings (the true one first), p = penalties, c = sites, r =
rank, h = hidden units, m = networks (penalties times labellings).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meduet_models.probes.cross_validation import Array, Index, Split, nested, patient_folds

LOGISTIC_PENALTIES = (1.0, 1e-1, 1e-2, 1e-3)
MLP_PENALTIES = (1e-2, 1e-4)
PERMUTATIONS = {"linear": 40, "mlp": 9}
_LOGISTIC_STEPS, _MLP_STEPS, _MLP_WIDTH = 60, 80, 32


@dataclass(frozen=True)
class NestedReading:
    """What a probe read from patients that it had not seen, beside the same procedure on permuted sites."""

    score: float
    """Balanced accuracy."""
    chance: float
    """1 / sites."""
    p_value: float
    """Share of labellings, the true one among them, that are read at least as well."""
    null_95: float
    """95th percentile of the scores of permuted labellings."""


def token_features(
    tokens: Float[Tensor, "b n k"], kind: Literal["mean", "deviation", "tokens"]
) -> Float[Tensor, "b f"]:
    """What a probe may read: the mean token, mean and deviation over tokens, or all tokens side by side."""
    match kind:
        case "mean":
            return tokens.mean(1)
        case "deviation":
            return torch.cat([tokens.mean(1), tokens.std(1, unbiased=False)], dim=1)
        case "tokens":
            return tokens.flatten(1)


def nested_site_probe(
    features: Float[Tensor, "b k"],
    sites: Sequence[int],
    patients: Sequence[str],
    seed: int,
    probe: Literal["linear", "mlp"] = "linear",
    permutations: int | None = None,
) -> NestedReading:
    """Balanced accuracy of a fresh probe with its p-value.

    `linear` is logistic regression with equal priors at the decision, `mlp` one hidden layer. The smallest
    p-value is 1 / (1 + permutations); none given: `PERMUTATIONS`. Raises `ValueError` with fewer than two
    sites or three patients.
    """
    names, labels = np.unique(np.asarray(sites), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"Expected scans of at least two sites to probe; got {len(names)}.")
    draws = PERMUTATIONS[probe] if permutations is None else permutations
    labellings = permuted_sites(labels, patients, draws, seed)  # l b
    folds = patient_folds(patients, seed, strata=labels.tolist())
    x = features.detach().double().cpu().numpy()
    said = np.empty_like(labellings)
    for outer, inner in nested(x, folds):
        hits = np.zeros((_num_penalties(probe), len(labellings), len(names)))
        seen = np.zeros((len(labellings), len(names)))
        for part in inner:
            read = _read(part, labellings, len(names), probe, seed)  # p l test
            truth = labellings[:, part.test]
            for site in range(len(names)):
                hits[:, :, site] += ((read == site) & (truth == site)).sum(-1)
                seen[:, site] += (truth == site).sum(-1)
        recall = (hits / np.maximum(seen, 1)).mean(-1)  # p l
        chosen = recall.argmax(0)  # penalties from strong to weak: the strongest of equals
        read = _read(outer, labellings, len(names), probe, seed)
        said[:, outer.test] = read[chosen, np.arange(len(labellings))]
    scores = _balanced_accuracy(said, labellings, len(names))
    null = scores[1:]
    return NestedReading(
        score=float(scores[0]),
        chance=1 / len(names),
        p_value=float((1 + (null >= scores[0] - 1e-12).sum()) / len(scores)),
        null_95=float(np.percentile(null, 95)) if len(null) else float("nan"),
    )


def permuted_sites(labels: Index, patients: Sequence[str], permutations: int, seed: int) -> Index:
    """The true labelling, then permuted ones, [labellings scans].

    A patient seen at several sites has her own labels permuted; patients seen at one site exchange it among
    each other, whole patients at a time.
    """
    rng = np.random.default_rng([seed, 1])
    groups = np.unique(np.asarray(patients), return_inverse=True)[1]
    rows = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    single = [own for own in rows if len(np.unique(labels[own])) == 1]
    drawn = np.repeat(labels[None], permutations + 1, axis=0)
    for labelling in drawn[1:]:
        for own in rows:
            labelling[own] = rng.permutation(labels[own])
        assigned = rng.permutation([labels[own[0]] for own in single]) if single else ()
        for own, site in zip(single, assigned, strict=True):
            labelling[own] = site
    return drawn


def _num_penalties(probe: str) -> int:
    return len(LOGISTIC_PENALTIES) if probe == "linear" else len(MLP_PENALTIES)


def _read(part: Split, labellings: Index, num_sites: int, probe: str, seed: int) -> Index:
    """The site read from each test row, [penalties labellings rows]."""
    known = torch.from_numpy(labellings[:, part.train])
    if probe == "linear":
        scores = logistic_scores(part.z_train, part.z_test, known, num_sites)
    else:
        scores = _mlp_scores(part.z_train, part.z_test, known, num_sites, seed)
    share = F.one_hot(known, num_sites).double().mean(1)  # l c
    scores = scores - share.clamp(min=1e-12).log()[:, None]  # equal priors
    scores = scores.masked_fill((share == 0)[:, None], -torch.inf)
    said: Index = scores.argmax(-1).numpy()
    return said


def logistic_scores(
    z: Array, unseen: Array, labels: Tensor, num_sites: int, steps: int = _LOGISTIC_STEPS
) -> Float[Tensor, "p l t c"]:
    """Logits of logistic regressions, one per penalty and labelling, on the rows `unseen`.

    Minimises mean cross-entropy + penalty / 2 · ‖weights‖² (intercepts free), in a basis in which the columns
    of `z` are orthogonal and centred: there the bound on the curvature is diagonal.
    """
    x = torch.from_numpy(z).float()
    target = F.one_hot(labels, num_sites).float().permute(1, 2, 0)[:, :, None]  # b c 1 l
    penalty = torch.tensor(LOGISTIC_PENALTIES)[:, None]
    shape = (num_sites, len(LOGISTIC_PENALTIES), len(labels))
    bound = x.square().mean(0)[:, None, None, None] / 2 + penalty
    weight, bias = torch.zeros(x.shape[1], *shape), torch.zeros(shape)
    ahead, ahead_bias, pace = weight, bias, 1.0
    for _ in range(steps):
        logits = (x @ ahead.flatten(1)).reshape(-1, *shape) + ahead_bias
        wrong = (logits.softmax(1) - target) / len(x)
        slope = (x.T @ wrong.flatten(1)).reshape(-1, *shape) + penalty * ahead
        stepped, stepped_bias = ahead - slope / bound, ahead_bias - 2 * wrong.sum(0)
        faster = (1 + (1 + 4 * pace**2) ** 0.5) / 2
        momentum = (pace - 1) / faster
        ahead = stepped + momentum * (stepped - weight)
        ahead_bias = stepped_bias + momentum * (stepped_bias - bias)
        weight, bias, pace = stepped, stepped_bias, faster
    scores = (torch.from_numpy(unseen).float() @ weight.flatten(1)).reshape(-1, *shape) + bias
    return scores.permute(2, 3, 0, 1).double()


def _mlp_scores(
    z: Array, unseen: Array, labels: Tensor, num_sites: int, seed: int
) -> Float[Tensor, "p l t c"]:
    """Logits of one-hidden-layer networks, full batch, Adam; all of them side by side."""
    generator = torch.Generator().manual_seed(seed)
    width = (z**2).mean() ** 0.5 + 1e-12
    x, new = (torch.from_numpy(values / width).float() for values in (z, unseen))
    penalty = torch.tensor(MLP_PENALTIES).repeat_interleave(len(labels))  # m
    target = labels.repeat(len(MLP_PENALTIES), 1)  # m b
    start = (
        torch.randn(x.shape[1], _MLP_WIDTH, generator=generator) / x.shape[1] ** 0.5,
        torch.zeros(1, _MLP_WIDTH),
        torch.randn(_MLP_WIDTH, num_sites, generator=generator) / _MLP_WIDTH**0.5,
        torch.zeros(1, num_sites),
    )
    leaves = [tensor.expand(len(penalty), -1, -1).clone().requires_grad_() for tensor in start]

    def logits(values: Tensor) -> Tensor:  # m b c
        return torch.baddbmm(leaves[3], torch.tanh(torch.matmul(values, leaves[0]) + leaves[1]), leaves[2])

    optimiser = torch.optim.Adam(leaves, lr=1e-2, foreach=True)
    with torch.enable_grad():
        for _ in range(_MLP_STEPS):
            said = logits(x).movedim(-1, 0)  # classes first: softmax over few classes is slow at the end
            read = F.nll_loss(said.log_softmax(0).movedim(0, 1), target, reduction="sum") / len(x)
            decay = sum((penalty[:, None, None] * leaves[i].square()).sum() for i in (0, 2))
            gradients = torch.autograd.grad(read + decay, leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimiser.step()
    with torch.no_grad():
        return logits(new).reshape(len(MLP_PENALTIES), len(labels), len(new), num_sites).double()


def _balanced_accuracy(said: Index, labellings: Index, num_sites: int) -> Array:
    recalls = [
        ((said == site) & (labellings == site)).sum(1) / np.maximum((labellings == site).sum(1), 1)
        for site in range(num_sites)
    ]
    mean: Array = np.mean(recalls, axis=0)
    return mean
