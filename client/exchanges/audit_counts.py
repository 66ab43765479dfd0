"""A site's answer to the counts of its own audit: attacks on its own patients, of which whole cells leave.

The attacker holds a candidate's scan, the final weights that came with the question, and the style sums that
left this site. Scores are used here and kept nowhere.
Does not do: attack (`audit/attacks/claims.py`), or write the site's report (`meduet-site audit`).
"""

import torch

from client.exchanges.exchange import Answer, OnStep, SiteAtWork
from client.release import Gate, Released
from client.training.trainee import student_of
from federation.exchanges.audit_counts import (
    AUDIT_COUNTS,
    TRIED,
    AuditCountsAsk,
    AuditCountsReply,
    audit_counts_shapes,
    cell_of,
)
from federation.plan.plan import RunPlan
from meduet_models.style.moments import CohortTooSmall
from privacy.whole_cohorts import in_whole_cohorts

_SPLITS = ("train", "validation", "test")
_SCANS_AT_ONCE = 64


def answer_audit_counts(
    site: SiteAtWork, ask: AuditCountsAsk, plan: RunPlan, gate: Gate, on_step: OnStep
) -> Released:
    """Counts of claims at one threshold. Raises `CohortTooSmall` where too few patients stayed out, or this
    site's own minimum is larger than a cell."""
    from audit.attacks.claims import (
        claims_of,  # the attacks take seconds to load: no other question waits for them
    )
    from audit.cohort import Cohort

    cell = cell_of(plan)
    if site.minimum_cohort > cell:
        raise CohortTooSmall(f"Expected a minimum cohort of at most a cell of {cell}; this site's is larger.")
    scans = site.scans(plan)
    rows = {row: split == "train" for split in _SPLITS for row in scans.indices(split)}
    chunks = [list(rows)[first : first + _SCANS_AT_ONCE] for first in range(0, len(rows), _SCANS_AT_ONCE)]
    latents = torch.cat([scans.latents(chunk) for chunk in chunks])
    people = tuple(scans.patients[row] for row in rows)
    cohort = Cohort(site.name, latents, people, tuple(rows.values()))
    claims = claims_of(cohort, plan, student_of(plan, ask.shared, None).eval())
    if claims is None:
        raise CohortTooSmall("Expected enough patients who stayed out to fix a threshold; got fewer.")
    exact = {attack: claims[attack].sum(0) for attack in TRIED}
    told = {attack: in_whole_cohorts(counts, cell) for attack, counts in exact.items()}
    patients = float(max(counts.sum() for counts in exact.values()))
    return gate.release(told, audit_counts_shapes(plan), weight=patients)


def audit_counts_mail(released: Released, ask: AuditCountsAsk, site: str) -> AuditCountsReply:
    """The reply."""
    return AuditCountsReply(plan_sha256=ask.plan_sha256, site=site, counts=dict(released.tensors))


ANSWER = Answer(AUDIT_COUNTS, answer_audit_counts, audit_counts_mail)
