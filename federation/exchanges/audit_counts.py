"""Counts of a site's own audit: once, after the last round, how many patients an attack claims and misses.

Where a plan asks for it. A site tries each of `ATTACKS` on its own patients, at one threshold that is fixed
on patients who are not counted; and so it does a classifier that sees no release (`BLIND`), so that the
centre knows where patients trained on differ from others by themselves. Scores never leave. Of those trained
on, and of others, it tells how many are claimed and how many are not, each count rounded down to whole cells
(`cell_of`), and nothing else.
What this file does not do: attack (`audit/attacks/claims.py`), or add up sites
(`server/exchanges/audit_counts.py`).
"""

import math
from dataclasses import dataclass
from typing import Final

import torch

from federation.exchanges.exchange import Exchange
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
from privacy.promise import Promise

ATTACKS: Final = ("loss", "tracing")
"""Loss of the final model on a candidate; how far a candidate leans towards the site's style sums."""
BLIND: Final = "blind"
"""Coarse statistics of a candidate's scan, and nothing that left."""
TRIED: Final = (*ATTACKS, BLIND)
"""All that counts are told of."""
CELLS: Final = 4
"""Of an attack, in this order: trained on and claimed, trained on and missed, others claimed, others not."""
SMALLEST_CELL = 20
"""Fewest patients in a cell that is told; a plan with a larger minimum cohort has larger cells."""


@dataclass(frozen=True, kw_only=True)
class AuditCountsAsk(Ask, kind="audit_counts_ask"):
    """After the last round: try the attacks, on these weights and on what you told before."""

    shared: Tensors


@dataclass(frozen=True, kw_only=True)
class AuditCountsReply(Reply, kind="audit_counts_reply"):
    """Counts of each attack, in whole cells."""

    counts: Tensors


@dataclass(frozen=True, kw_only=True)
class Told:
    """Counts of one side, those trained on or others, added up over sites."""

    claimed: int
    missed: int
    sites: int
    """Sites that told a cell of either; each may have up to a cell less one more in both."""


@dataclass(frozen=True, kw_only=True)
class PooledCounts:
    """Counts of one attack, added up over sites."""

    members: Told
    others: Told


@dataclass(frozen=True, kw_only=True)
class AuditCounts:
    """What the sites of a run told; `audit_counts.json` in its folder."""

    plan_sha256: str
    cell: int
    sites: int
    """Sites that answered."""
    attacks: dict[str, PooledCounts]
    """By name, `BLIND` among them."""
    refused: dict[str, str]


def cell_of(plan: RunPlan) -> int:
    """The size of a cell: every count is a multiple of it."""
    return max(SMALLEST_CELL, smallest_cohort(plan))


def audit_counts_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels: the cells of each attack."""
    return {attack: (CELLS,) for attack in TRIED}


def largest_audit_counts(plan: RunPlan, ask: AuditCountsAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(audit_counts_shapes(plan), torch.float64))


def claims_promise(plan: RunPlan) -> Promise:
    """A patient who is counted counts once for each attack, and once for the classifier that sees no release.
    Not covered: who was not trained on and is in the half on which thresholds are fixed; of these the site
    tells no count. Nor is it what her scan adds to the classifier's weights."""
    bound = math.sqrt(len(TRIED))
    return Promise(kind="audit_counts", bound=bound, unit="patient statistics", enforcement="check")


def audit_counts_promise(plan: RunPlan, ask: AuditCountsAsk) -> Promise:
    """There is one question."""
    return claims_promise(plan)


def audit_counts_rounds(plan: RunPlan) -> range:
    """With the last round, where the plan asks."""
    last = plan.num_rounds
    return range(last, last + 1) if plan.audit_counts is not None else range(0)


AUDIT_COUNTS = Exchange(
    route="query.audit_counts",
    ask=AuditCountsAsk,
    reply=AuditCountsReply,
    rounds=audit_counts_rounds,
    largest=largest_audit_counts,
    promise=audit_counts_promise,
)
