"""Counts that left, attacked: one patient more or less, by whoever knows all the others.

The attacker knows in which cells each other patient counts, and asks whether a candidate is counted, too.
Exact counts always tell him. Counts in whole cohorts tell him where a patient fills or opens a cohort: there
one more changes what is told.

What this file does not do: count patients; each exchange says how it counts.

Axes: n = candidates, k = cells.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audit.attacks.sums import not_recomputed
from audit.cohort import Cohort
from audit.evidence import Release
from audit.findings import Finding, parts
from audit.statistics.intervals import clopper_pearson
from federation.exchanges.demographics import AGES, SEXES, counted
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from privacy.whole_cohorts import in_whole_cohorts


def attack_demographics(release: Release, cohort: Cohort, plan: RunPlan) -> Finding | None:
    """Counts by age and sex; None where the candidates' covariates are not at hand."""
    if plan.demographics is None or not cohort.covariates or release.tensors is None:
        return None
    known = [cohort.covariates[cohort.rows(person)[0]] for person in cohort.people]
    each = [counted([one], plan.demographics.age_edges) for one in known]
    shares = torch.stack([torch.cat([one[AGES], one[SEXES]]) for one in each])
    told = torch.cat([release.tensors[AGES], release.tensors[SEXES]])
    return attack_counts(release.artefact, shares, cohort.member, told, smallest_cohort(plan))


def attack_counts(
    artefact: str, shares: Float[Tensor, "n k"], member: np.ndarray, told: Float[Tensor, " k"], least: int
) -> Finding:
    """Of how many patients it shows in what was told whether they are counted. `shares`: in which cells each
    candidate counts; `least`: the smallest cohort that the plan allows, of which the site's may be larger."""
    began, inside = time.process_time(), torch.from_numpy(member)
    exact = shares[inside].sum(0)
    step = next((one for one in _steps(exact, least) if in_whole_cohorts(exact, one).equal(told)), None)
    if step is None or not member.any():
        return not_recomputed(artefact, "counts", member)
    without = exact - shares * inside[:, None]  # n k: what is counted besides each candidate
    shows = _differ(without, without + shares, step)
    hits, n_in = int(shows[inside].sum()), int(member.sum())
    absent, n_out = int(shows[~inside].sum()), int((~member).sum())
    low, high = clopper_pearson(hits, n_in)
    site, what = parts(artefact)
    rounding = f"in whole cohorts of {step}" if step > 1 else "exact"
    return Finding(
        artefact=artefact,
        attack="counts",
        measure="patients told by counts",
        n_in=n_in,
        n_out=n_out,
        value=hits / n_in,
        low=low,
        high=high,
        verdict="found" if hits else "not found",
        sentence=f"Whoever knows all other patients of {site}, and the candidate, reads from '{what}' "
        f"({rounding}) that she is among them: {hits} of {n_in} patients"
        + (f"; of {absent} of {n_out} others that they are not" if n_out else "")
        + ". Exact counts tell all.",
        seconds=time.process_time() - began,
    )


def _steps(exact: Float[Tensor, " k"], least: int) -> Iterator[int]:
    """Sizes of a cohort that may have been rounded to: the plan's, a site's larger one, and what no site of
    this version rounds to."""
    yield from range(least, max(least, int(exact.max())) + 1)
    yield from range(1, least)


def _differ(less: Float[Tensor, "n k"], more: Float[Tensor, "n k"], step: int) -> Bool[Tensor, " n"]:
    told: Tensor = (in_whole_cohorts(less, step) != in_whole_cohorts(more, step)).any(1)
    return told
