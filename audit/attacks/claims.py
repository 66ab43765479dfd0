"""Claims of an attack at one threshold, as counts that sites may tell and a centre pools.

Half of the patients who were not trained on, dealt by a hash of their names, fix the threshold, and are what
is usual; nobody of them is counted. All others are: whoever is above the threshold is claimed. Sites tell
counts in whole cells, so a cell holds what was told and up to a cell less one more for each site. The
intervals of a pooled rate are exact (Clopper-Pearson) and hold for whatever the rounding hides.

What this file does not do: let anything out (`client/exchanges/audit_counts.py`).

Axes: n = patients, d = numbers in a vector, k = cells of an attack.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks import algebra
from audit.attacks.counts import attack_counts
from audit.attacks.membership import losses
from audit.attacks.scores import FEWEST
from audit.attacks.sums import style_vectors
from audit.cohort import Cohort
from audit.evidence import Release
from audit.findings import Finding, Pooled, Rate, Verdict
from audit.statistics.intervals import clopper_pearson
from federation.exchanges.audit_counts import ATTACKS, PooledCounts, Told, cell_of
from federation.exchanges.survey import SURVEY
from federation.plan import RunPlan
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
    claims = {"loss": _cells(-loss, cohort.member, fixes, share)}
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
    shares = torch.cat([claims[attack] for attack in ATTACKS], 1)
    told = torch.cat([release.tensors[attack] for attack in ATTACKS])
    counted = shares.any(1).numpy()
    return attack_counts(release.artefact, shares[counted], np.ones(counted.sum(), bool), told, cell_of(plan))


def pooled_claims(artefact: str, attack: str, told: PooledCounts, cell: int) -> Finding:
    """What sites told of one attack on their own patients, together: the area under the two straight lines
    through its one point, which is no larger than that of an attacker who may choose his threshold."""
    members, others = _rate(told.members, cell), _rate(told.others, cell)
    low, high = (1 + members.low - others.high) / 2, (1 + members.high - others.low) / 2
    least = (high - low) / 2
    verdict: Verdict = "found" if low > 0.5 else "under-powered" if 0.5 + least > _TELLS else "not found"
    value = None
    if members.value is not None and others.value is not None:
        value = (1 + members.value - others.value) / 2
    return Finding(
        artefact=artefact,
        attack=attack,
        measure="AUC",
        n_in=members.claimed + members.missed,
        n_out=others.claimed + others.missed,
        verdict=verdict,
        sentence=f"Sites tried '{attack}' on their own patients, each at one threshold, and told counts in "
        f"whole cells of {cell}: of patients trained on {_said(members)} are claimed, of others "
        f"{_said(others)}. {_FOLLOWS[verdict]} Fewer than {cell} are told as none, also of an attack that "
        "misses nobody.",
        value=value,
        low=low,
        high=high,
        ceiling=min(1.0, 0.5 + least),
        pooled=Pooled(cell=cell, members=members, others=others),
    )


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
