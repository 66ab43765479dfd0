"""Demographics: asked once, before round 1, where the plan has them; added up over the sites.

Stops nothing: a site that does not tell is not counted. Does not do: keep what a single site told.
"""

import torch
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.demographics import (
    AGES,
    DEMOGRAPHICS,
    SEX_NAMES,
    SEXES,
    DemographicsAsk,
    DemographicsReply,
    age_bands,
    demographics_shapes,
)
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_PATIENTS
from server.exchanges.queries import ask_sites
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster

Demographics = dict[str, dict[str, int]]


def ask_demographics(
    grid: Grid, roster: Roster, plan: RunPlan, book: ReplyBook
) -> tuple[Demographics, list[str], dict[str, str]]:
    """Patients of all sites by band, which sites told, and who was put aside why."""
    ask = DemographicsAsk(plan_json=plan.to_json())

    def check(reply: DemographicsReply) -> None:
        check_counts(reply.counts, plan)

    replies, refused = ask_sites(grid, roster, plan, DEMOGRAPHICS, ask, check, book, stops=False)
    assert plan.demographics is not None, "only a plan that has them is asked for them"
    names = {AGES: age_bands(plan.demographics.age_edges), SEXES: SEX_NAMES}
    total = {
        what: {
            band: sum(int(reply.counts[what][at]) for reply in replies.values())
            for at, band in enumerate(bands)
        }
        for what, bands in names.items()
    }
    return total, list(replies), refused


def check_counts(counts: dict[str, Tensor], plan: RunPlan) -> None:
    """Raise `ReplyRefused` unless these are counts that a site of the plan may tell."""
    shapes = demographics_shapes(plan)
    if {name: tuple(tensor.shape) for name, tensor in counts.items()} != shapes:
        raise ReplyRefused(f"Expected counts {sorted(shapes)} of the plan's bands; got other tensors.")
    least = smallest_cohort(plan)
    for tensor in counts.values():
        told = tensor[tensor != 0]
        if not torch.isfinite(tensor).all() or (told != told.floor()).any() or (told < least).any():
            raise ReplyRefused(f"Expected whole counts, none between 0 and {least}; got others.")
        if float(tensor.sum()) > MOST_PATIENTS:
            raise ReplyRefused(f"Expected at most {MOST_PATIENTS} patients; got more.")
