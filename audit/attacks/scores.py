"""Scores into findings: how well a score tells members from others, and when that means nothing.

A score is larger for whom the attacker takes for a member; scores of several sites are standardised within
each first, so that knowing the site helps nobody. What tells members from others without the release
(`blind_from`) voids the row: then the two groups differ by themselves. Fewer than `FEWEST` others:
under-powered.

A lower bound of epsilon follows from pairs: each member is paired at random with another of its site; given
that patients were dealt into splits by a hash of their names, which of the two is the member is a fair coin
(`one_run.py`).

What this file does not do: attack.

Source of the blind baseline: Das et al. 2024 (arXiv:2406.16201).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from audit.findings import Finding, Verdict
from audit.statistics.intervals import area, area_interval, rate_at, roc, smallest_told
from audit.statistics.one_run import epsilon_of_pairs

FEWEST = 20
"""Others below which no membership is claimed or denied."""
FALSE_ALARMS = 0.01
_TELLS = 0.60
_FOLDS = 5


@dataclass(frozen=True)
class Scores:
    """Scores of candidates, one per patient."""

    values: np.ndarray
    """Larger: more like a member."""
    member: np.ndarray
    """Whether each was one."""
    site: np.ndarray
    """Number of the site of each."""
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By attribute, the subgroup of each; empty text: not known."""

    def within_sites(self) -> "Scores":
        """Standardised within each site, by mean and deviation of all its candidates."""
        values = self.values.astype(float).copy()
        for one in np.unique(self.site):
            mine = self.site == one
            values[mine] = (values[mine] - values[mine].mean()) / max(values[mine].std(), 1e-12)
        return self.with_values(values)

    def with_values(self, values: np.ndarray) -> "Scores":
        """The same candidates with other scores."""
        return replace(self, values=values)

    def some(self, rows: np.ndarray) -> "Scores":
        """Of some candidates; `rows`: whether each is one."""
        groups = {name: labels[rows] for name, labels in self.groups.items()}
        return Scores(self.values[rows], self.member[rows], self.site[rows], groups)

    @property
    def inside(self) -> np.ndarray:
        """Scores of members."""
        members: np.ndarray = self.values[self.member]
        return members

    @property
    def outside(self) -> np.ndarray:
        """Scores of others."""
        others: np.ndarray = self.values[~self.member]
        return others

    def permuted(self, generator: np.random.Generator) -> "Scores":
        """The same with membership dealt anew within each site."""
        member = self.member.copy()
        for one in np.unique(self.site):
            mine = np.flatnonzero(self.site == one)
            member[mine] = generator.permutation(member[mine])
        return replace(self, member=member)


def blind_from(features: np.ndarray, member: np.ndarray, site: np.ndarray, seed: int = 0) -> Scores:
    """Scores of a classifier that sees no release: ridge from features of candidates to membership,
    cross-validated over patients within each site."""
    values = np.zeros(len(member))
    for one in np.unique(site):
        mine = site == one
        values[mine] = _cross_validated(features[mine], member[mine], np.random.default_rng(seed))
    return Scores(values, member, site)


def _cross_validated(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    predicted = np.zeros(len(y))
    if y.all() or not y.any():
        return predicted
    folds = np.zeros(len(y), int)
    for side in (True, False):  # as many of either side in each fold
        rows = generator.permutation(np.flatnonzero(y == side))
        folds[rows] = np.arange(len(rows)) % _FOLDS
    for fold in range(_FOLDS):
        fitted, asked = folds != fold, folds == fold
        a, target = x[fitted], y[fitted] - y[fitted].mean()
        weight = np.linalg.solve(a.T @ a + len(a) * np.eye(x.shape[1]), a.T @ target)
        predicted[asked] = x[asked] @ weight
    return predicted


def judged(
    artefact: str,
    attack: str,
    scores: Scores,
    sentence: str,
    blind: Scores | None = None,
    began: float | None = None,
) -> Finding:
    """The finding of a score. `sentence` names who tells what; numbers and verdict are added to it."""
    scores = scores.within_sites()
    n_in, n_out = int(scores.member.sum()), int((~scores.member).sum())
    seconds = 0.0 if began is None else time.process_time() - began
    plain = Finding(
        artefact=artefact,
        attack=attack,
        measure="AUC",
        n_in=n_in,
        n_out=n_out,
        verdict="under-powered",
        sentence=f"Not tried: {n_in} members and {n_out} others; at least {FEWEST} others are needed. Set "
        "site.split_fractions so that patients stay out.",
        seconds=seconds,
    )
    if n_out < FEWEST or n_in == 0:
        return plain
    value = area(scores.inside, scores.outside)
    low, high = area_interval(value, n_in, n_out)
    baseline = None
    if blind is not None:
        blind = blind.within_sites()
        baseline = area(blind.inside, blind.outside)
    void = baseline is not None and area_interval(baseline, n_in, n_out)[0] > 0.5
    ceiling = smallest_told(n_in, n_out)
    verdict, said = _said(value, low, ceiling, void)
    worst = worst_group(scores)
    rate = rate_at(scores.inside, scores.outside, FALSE_ALARMS)
    return replace(
        plain,
        verdict=verdict,
        sentence=f"{sentence} {said}",
        value=value,
        low=low,
        high=high,
        ceiling=ceiling,
        baseline=baseline,
        true_positive_rate=None if rate is None else rate[0],
        epsilon_low=None if void else epsilon_of_pairs(scores.values, scores.member, scores.site),
        roc=tuple(roc(scores.inside, scores.outside)),
        worst_group="" if worst is None else worst[0],
        worst_value=None if worst is None else worst[1],
    )


def worst_group(scores: Scores) -> tuple[str, float] | None:
    """The subgroup with the largest area, and that area; None where no attribute has two subgroups with
    `FEWEST` members and others each."""
    areas: dict[str, float] = {}
    for attribute, labels in scores.groups.items():
        own = {}
        for label in sorted(set(labels.tolist()) - {""}):
            mine = labels == label
            inside, outside = scores.values[mine & scores.member], scores.values[mine & ~scores.member]
            if min(len(inside), len(outside)) >= FEWEST:
                own[f"{attribute} {label}"] = area(inside, outside)
        areas |= own if len(own) > 1 else {}
    return max(areas.items(), key=lambda one: one[1], default=None)


def _said(value: float, low: float, ceiling: float, void: bool) -> tuple[Verdict, str]:
    if void:
        return "void", "Void: members and others are told apart without it, so nothing follows."
    if low > 0.5:
        return "found", f"It does: AUC {value:.2f}, of which chance is .50."
    if ceiling > _TELLS:
        return (
            "under-powered",
            f"Not found (AUC {value:.2f}), and below {ceiling:.2f} nothing could have been with so few.",
        )
    return (
        "not found",
        f"Not found by this attack (AUC {value:.2f}); below {ceiling:.2f} nothing could have been.",
    )


def false_alarms(scores: Sequence[Scores], draws: int, seed: int = 0) -> tuple[int, int]:
    """How many of so many draws of nobody's membership, for each score, are claimed; and of how many."""
    generator = np.random.default_rng(seed)
    alarms = tried = 0
    for own in scores:
        standard = own.within_sites()
        if int((~standard.member).sum()) < FEWEST:
            continue
        claimed_above = smallest_told(len(standard.inside), len(standard.outside))
        for _ in range(draws):
            dealt = standard.permuted(generator)
            alarms += area(dealt.inside, dealt.outside) > claimed_above
            tried += 1
    return alarms, tried
