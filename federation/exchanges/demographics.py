"""Demographics: once before round 1, how many training patients are in each band of ages, and of each sex.

For the model card, where a plan asks for it. Every count is rounded down to whole minimum cohorts, so that a
band with fewer patients says nothing; each patient counts once, in one band of ages and as one sex.
What this file does not do: count (`client/exchanges/demographics.py`), or add up sites
(`server/exchanges/demographics.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from federation.exchanges.exchange import Exchange
from federation.limits import Largest, largest_reply, promised
from federation.messages import Ask, Reply, Tensors
from federation.plan import RunPlan
from privacy.promise import Promise

AGES, SEXES = "ages", "sexes"
SEX_NAMES = ("F", "M", "not known")


@dataclass(frozen=True, kw_only=True)
class DemographicsAsk(Ask, kind="demographics_ask"):
    """Before round 1: tell how many patients are in each band."""


@dataclass(frozen=True, kw_only=True)
class DemographicsReply(Reply, kind="demographics_reply"):
    """Patients of a site by age and by sex, in whole minimum cohorts."""

    counts: Tensors


def age_bands(edges: Sequence[float]) -> tuple[str, ...]:
    """Names of the bands between these ages in years, the open ones and "not known" among them."""
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return (f"under {edges[0]:g}", *inner, f"{edges[-1]:g} and over", "not known")


def demographics_shapes(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels: a count for each band."""
    assert plan.demographics is not None, "only a plan that has them is asked for them"
    return {AGES: (len(age_bands(plan.demographics.age_edges)),), SEXES: (len(SEX_NAMES),)}


def largest_demographics(plan: RunPlan, ask: DemographicsAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_reply(promised(demographics_shapes(plan), torch.float64))


def counts_promise(plan: RunPlan) -> Promise:
    """A patient counts once as an age and once as a sex; rounding down makes no share longer than that of a
    whole cohort, and the sum no longer than it was."""
    return Promise(kind="demographics", bound=math.sqrt(2), unit="patient statistics", enforcement="check")


def demographics_promise(plan: RunPlan, ask: DemographicsAsk) -> Promise:
    """There is one question."""
    return counts_promise(plan)


DEMOGRAPHICS = Exchange(
    route="query.demographics",
    ask=DemographicsAsk,
    reply=DemographicsReply,
    rounds=lambda plan: range(plan.demographics is not None),
    largest=largest_demographics,
    promise=demographics_promise,
)
