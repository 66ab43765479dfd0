"""Counts of sites' own audits: asked once, after the last round, where the plan has them; added up.

Stops nothing: a site that does not tell is not counted. What was told is a file of the run, whose hash the
journal has. Does not do: keep what a single site told, or say what follows (`server/holdings.py`).
"""

import dataclasses
import json
from collections.abc import Sequence

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.audit_counts import (
    AUDIT_COUNTS,
    TRIED,
    AuditCounts,
    AuditCountsAsk,
    AuditCountsReply,
    PooledCounts,
    Told,
    audit_counts_shapes,
    cell_of,
)
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_PATIENTS
from federation.wire.messages import Tensors
from forms.form import build
from forms.json_text import read_json
from server.exchanges.queries import ask_sites
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster

FILE = "audit_counts.json"
"""What sites told, in the folder of a run."""


def ask_audit_counts(
    grid: Grid, roster: Roster, plan: RunPlan, shared: Tensors, book: ReplyBook
) -> tuple[AuditCounts, list[str]]:
    """Counts of all sites together, and which sites told."""
    ask = AuditCountsAsk(plan_json=plan.to_json(), shared=shared)

    def check(reply: AuditCountsReply) -> None:
        check_audit_counts(reply.counts, plan)

    replies, refused = ask_sites(grid, roster, plan, AUDIT_COUNTS, ask, check, book, stops=False)
    attacks = {attack: pooled([reply.counts[attack] for reply in replies.values()]) for attack in TRIED}
    told = AuditCounts(
        plan_sha256=plan.sha256, cell=cell_of(plan), sites=len(replies), attacks=attacks, refused=refused
    )
    return told, list(replies)


def pooled(each: Sequence[Tensor]) -> PooledCounts:
    """Counts of one attack by site, added up: of each side over the sites that told a cell of it."""

    def added(cells: slice) -> Told:
        sides = [counts[cells] for counts in each if bool(counts[cells].any())]
        claimed, missed = (int(sum(float(side[at]) for side in sides)) for at in (0, 1))
        return Told(claimed=claimed, missed=missed, sites=len(sides))

    return PooledCounts(members=added(slice(0, 2)), others=added(slice(2, 4)))


def check_audit_counts(counts: dict[str, Tensor], plan: RunPlan) -> None:
    """Raise `ReplyRefused` unless these are counts that a site of the plan may tell."""
    shapes, cell = audit_counts_shapes(plan), cell_of(plan)
    if {name: tuple(tensor.shape) for name, tensor in counts.items()} != shapes:
        raise ReplyRefused(f"Expected counts of the attacks {', '.join(TRIED)}; got other tensors.")
    for tensor in counts.values():
        if not torch.isfinite(tensor).all() or (tensor < 0).any() or (tensor % cell != 0).any():
            raise ReplyRefused(f"Expected counts in whole cells of {cell}; got others.")
        if float(tensor.sum()) > MOST_PATIENTS:
            raise ReplyRefused(f"Expected at most {MOST_PATIENTS} patients; got more.")


def to_json(told: AuditCounts) -> str:
    """As the file holds it."""
    return json.dumps(dataclasses.asdict(told), indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_audit_counts(text: str) -> AuditCounts:
    """Back from `to_json`; raises `ValueError` for anything else."""
    return build(AuditCounts, read_json(text, "the counts of sites' audits"), FILE)
