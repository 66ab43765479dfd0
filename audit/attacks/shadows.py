"""Models retrained in the run's place: does the published model fit a candidate better than models that were
trained without her do, more than it does for others?

A candidate's ratio is the likelihood of her scan under the published model over that under the models without
her, exp(-loss) as a likelihood; her score is the share of others at her site whose ratio is not above hers.
How much a model without her counts (`a`) is chosen among the retrained models alone, of whom the attacker
knows who is in. Candidates whom every retrained model was trained on are left out.

What this file does not do: train (whoever opens a run does).

Source: RMIA, offline: Zarifzadeh, Liu, Shokri 2024 (arXiv:2312.03262).

Axes: n = patients, r = retrained models.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from audit.attacks.membership import blind, losses, scores_of
from audit.attacks.scores import Scores, judged
from audit.cohort import Cohort
from audit.evidence import Evidence, Shadow
from audit.findings import Finding
from audit.statistics.intervals import area
from meduet_models.meduet import FactorNetwork
from meduet_models.published.pretrained import MODEL

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Losses:
    """What models make of candidates, site by site after one another."""

    published: np.ndarray
    """n."""
    retrained: np.ndarray
    """r n."""
    without: np.ndarray
    """r n: whether a model was trained without her."""
    site: np.ndarray


def ratios(target: np.ndarray, others: np.ndarray, without: np.ndarray, a: float) -> np.ndarray:
    """Logarithm of each candidate's ratio; NaN of whom no model is without."""
    scale = float(np.median(target))
    likely, known = np.exp(-target / scale), np.where(without, np.exp(-others / scale), np.nan)
    count = np.maximum(without.sum(0), 1)
    out = np.where(without.any(0), np.nansum(known, 0) / count, np.nan)
    return np.asarray(np.log(likely) - np.log(((1 + a) * out + 1 - a) / 2))


def best_share(told: Losses) -> float:
    """The `a` with which the retrained models tell, of the first of them, whom it was trained on; 1 where
    there is one model only."""
    if len(told.retrained) < 2:
        return 1.0
    first, inside = told.retrained[0], ~told.without[0]

    def told_apart(a: float) -> float:
        values = ratios(first, told.retrained[1:], told.without[1:], a)
        known = ~np.isnan(values)
        member = inside[known]
        return area(values[known][member], values[known][~member]) if 0 < member.sum() < len(member) else 0.5

    return max(_SHARES, key=told_apart)


def ranked(values: np.ndarray, member: np.ndarray, site: np.ndarray) -> np.ndarray:
    """Of each, the share of the others of her site whose ratio is not above hers."""
    shares = np.zeros(len(values))
    for one in np.unique(site):
        mine, others = site == one, (site == one) & ~member
        below = np.sort(values[others])
        shares[mine] = np.searchsorted(below, values[mine], "right") / max(1, len(below))
    return shares


def attack_by_shadows(
    evidence: Evidence, draws: int, scored: list[tuple[Finding, Scores]]
) -> Iterator[Finding]:
    """The published model, beside those that were retrained; nothing where none was."""
    if evidence.model is None or not evidence.shadows:
        return
    began, cohorts = time.process_time(), list(evidence.cohorts.values())
    told = _losses(evidence.model, evidence.shadows, cohorts, draws)
    a = best_share(told)
    values = ratios(told.published, told.retrained, told.without, a)
    member, known = np.concatenate([one.member for one in cohorts]), ~np.isnan(values)
    scores = Scores(ranked(values[known], member[known], told.site[known]), member[known], told.site[known])
    whole = blind(cohorts)
    without = Scores(whole.values[known], member[known], told.site[known])
    count = len(evidence.shadows)
    sentence = (
        f"Whoever retrains {count} model{'s' if count > 1 else ''} on scans like these takes a better fit "
        f"than theirs without her for membership ({int(known.sum())} of {len(known)} candidates, a = {a:g})."
    )
    finding = judged(MODEL, "shadow", scores, sentence, without, began)
    scored.append((finding, scores))
    yield finding


def _losses(
    network: FactorNetwork, shadows: Sequence[Shadow], cohorts: Sequence[Cohort], draws: int
) -> Losses:
    def of(one: FactorNetwork) -> Scores:
        return scores_of(cohorts, {c.site: losses(one, c.latents, draws) for c in cohorts})

    own = of(network)
    people = [(one.site, name) for one in cohorts for name in one.people]
    outside = [[name not in one.trained_on.get(site, ()) for site, name in people] for one in shadows]
    return Losses(
        own.values, np.stack([of(one.network).values for one in shadows]), np.array(outside), own.site
    )
