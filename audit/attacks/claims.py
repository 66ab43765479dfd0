"""Claims of an attack at one threshold, as counts that sites may tell and a centre pools.

Half of the patients who were not trained on, dealt by a hash of their names, fix the threshold, and are what
is usual; nobody of them is counted. All others are: whoever is above the threshold is claimed. Sites tell
counts in whole cells, so a cell holds what was told and up to a cell less one more for each site. The
intervals of a pooled rate are exact (Clopper-Pearson) and hold for whatever the rounding hides.

What this file does not do: let anything out (`client/exchanges/audit_counts.py`).

Axes: n = patients, d = numbers in a vector, k = cells of an attack.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks import algebra
from audit.attacks.counts import attack_counts
from audit.attacks.membership import blind, losses
from audit.attacks.scores import FEWEST
from audit.attacks.sums import style_vectors
from audit.cohort import Cohort
from audit.evidence import Release
from audit.findings import Finding, Pooled, Rate, Verdict
from audit.statistics.intervals import clopper_pearson
from federation.exchanges.audit_counts import BLIND, TRIED, PooledCounts, Told, cell_of
from federation.exchanges.survey import SURVEY
from federation.plan.plan import RunPlan
from forms.json_text import sha256_of
from meduet_models.meduet import FactorNetwork

_DRAWS = 4
"""Draws of hidden tokens behind a loss."""
_TELLS = 0.60
_LEVEL = 0.975
"""Of each rate, so that both hold together with 95%."""
_FOLLOWS: Mapping[Verdict, str] = {
    "found": "It tells one from the other.",
    "not found": "It was not found to tell one from the other.",
    "under-powered": "With so few, nothing follows.",
    "void": "Void: patients trained on and others are told apart without any release, so nothing follows.",
}


def claims_of(
    cohort: Cohort, plan: RunPlan, network: FactorNetwork
) -> dict[str, Float[Tensor, "n k"]] | None:
    """By attack, in which cell each of `people` counts; all zeros for who fixes the threshold, and of an
    attack that could not be tried. None where fewer than `FEWEST` could fix it, or the plan does not ask."""
    fixes = fix_threshold(cohort)
    if plan.audit_counts is None or fixes.sum() < FEWEST:
        return None
    share = plan.audit_counts.false_alarms
    loss = cohort.per_person(losses(network, cohort.latents, _DRAWS)[:, None])[:, 0].numpy()
    claims = {
        "loss": _cells(-loss, cohort.member, fixes, share),
        BLIND: _cells(blind([cohort]).values, cohort.member, fixes, share),
    }
    vectors = style_vectors(cohort, plan) if SURVEY.rounds(plan) else None
    if vectors is None:
        return claims | {"tracing": torch.zeros_like(claims["loss"])}
    return claims | {"tracing": _cells(_leaning(vectors, cohort.member, fixes), cohort.member, fixes, share)}


def fix_threshold(cohort: Cohort) -> np.ndarray:
    """Which of `people` fix thresholds: of those who took no part the half that a hash of their names says,
    whoever else is there."""
    half = np.array([int(sha256_of(f"fixes a threshold: {name}"), 16) % 2 == 0 for name in cohort.people])
    fixes: np.ndarray = half & ~cohort.member
    return fixes


def _leaning(vectors: Float[Tensor, "n d"], member: np.ndarray, fixes: np.ndarray) -> np.ndarray:
    """How far each leans towards the mean of the members, which the style sums told, beside those who fix the
    threshold; of these each beside the others."""
    usual, mean = vectors[torch.from_numpy(fixes)], vectors[torch.from_numpy(member)].double().mean(0)
    values = algebra.leaning(vectors, mean, usual).numpy()
    everybody = torch.ones(len(usual), dtype=torch.bool)
    values[fixes] = algebra.leaning_of_each(usual, mean, everybody).numpy()
    return values


def _cells(scores: np.ndarray, member: np.ndarray, fixes: np.ndarray, share: float) -> Float[Tensor, "n k"]:
    """One in the cell in which each counts. The threshold lets this share of those who fix it pass."""
    threshold = np.quantile(scores[fixes], 1 - share, method="higher")
    claimed = scores > threshold
    cells = np.stack([claimed & member, ~claimed & member, claimed & ~member, ~claimed & ~member], 1)
    return torch.from_numpy((cells & ~fixes[:, None]).astype(np.float64))


def attack_claims(release: Release, cohort: Cohort, plan: RunPlan, network: FactorNetwork) -> Finding | None:
    """The counts that left, attacked by whoever knows the scores of all patients but one."""
    claims = claims_of(cohort, plan, network)
    if claims is None or release.tensors is None:
        return None
    shares = torch.cat([claims[attack] for attack in TRIED], 1)
    told = torch.cat([release.tensors[attack] for attack in TRIED])
    counted = shares.any(1).numpy()
    return attack_counts(release.artefact, shares[counted], np.ones(counted.sum(), bool), told, cell_of(plan))


def pooled_claims(artefact: str, attack: str, told: PooledCounts, blind: PooledCounts, cell: int) -> Finding:
    """What sites told of one attack on their own patients, together: the area under the two straight lines
    through its one point, which is no larger than that of an attacker who may choose his threshold. Void
    where the same of the classifier that sees no release (`blind`) is told from chance."""
    own, without = _Area.of(told, cell), _Area.of(blind, cell)
    least = (own.high - own.low) / 2
    verdict: Verdict = "found" if own.low > 0.5 else "under-powered" if 0.5 + least > _TELLS else "not found"
    if without.low > 0.5:
        verdict = "void"
    beside = "; no site told of one" if without.value is None else f" {without.value:.2f}"
    return Finding(
        artefact=artefact,
        attack=attack,
        measure="AUC",
        n_in=own.members.claimed + own.members.missed,
        n_out=own.others.claimed + own.others.missed,
        verdict=verdict,
        sentence=f"Sites tried '{attack}' on their own patients, each at one threshold, and told counts in "
        f"whole cells of {cell}: of patients trained on {_said(own.members)} are claimed, of others "
        f"{_said(own.others)} (area of a classifier that sees no release{beside}, {without.low:.2f} to "
        f"{without.high:.2f}). {_FOLLOWS[verdict]} Fewer than {cell} are told as none, also of an attack "
        "that misses nobody.",
        value=own.value,
        low=own.low,
        high=own.high,
        ceiling=min(1.0, 0.5 + least),
        baseline=without.value,
        pooled=Pooled(cell=cell, members=own.members, others=own.others),
    )


@dataclass(frozen=True)
class _Area:
    """Both rates of one attack, and the area that follows."""

    members: Rate
    others: Rate
    low: float
    high: float

    @staticmethod
    def of(told: PooledCounts, cell: int) -> "_Area":
        members, others = _rate(told.members, cell), _rate(told.others, cell)
        low, high = (1 + members.low - others.high) / 2, (1 + members.high - others.low) / 2
        return _Area(members, others, low, high)

    @property
    def value(self) -> float | None:
        if self.members.value is None or self.others.value is None:
            return None
        return (1 + self.members.value - self.others.value) / 2


def _rate(told: Told, cell: int) -> Rate:
    """The share that is claimed: of what was told, and its interval over all that may be behind it."""
    hidden = told.sites * (cell - 1)
    known = told.claimed + told.missed
    return Rate(
        claimed=told.claimed,
        missed=told.missed,
        sites=told.sites,
        value=told.claimed / known if known else None,
        low=clopper_pearson(told.claimed, known + hidden, _LEVEL)[0] if known else 0.0,
        high=clopper_pearson(told.claimed + hidden, known + hidden, _LEVEL)[1] if known else 1.0,
    )


def _said(rate: Rate) -> str:
    if rate.value is None:
        return "an unknown share (no site told)"
    known = rate.claimed + rate.missed
    return (
        f"{rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%}; {rate.claimed} of {known} "
        f"told by {rate.sites} {'site' if rate.sites == 1 else 'sites'})"
    )
