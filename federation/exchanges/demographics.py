"""Demographics: once before round 1, how many training patients are in each band of ages, and of each sex.

For the model card, where a plan asks for it. Every count is rounded down to whole minimum cohorts, so that a
band with fewer patients says nothing; each patient counts once, in one band of ages and as one sex.
The one place where a site and an audit take from how patients are counted.
What this file does not do: read tables (`client/exchanges/demographics.py`), or add up sites
(`server/exchanges/demographics.py`).
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
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


def counted(patients: Sequence[Mapping[str, str | float]], age_edges: Sequence[float]) -> dict[str, Tensor]:
    """How many of these patients are in each band of ages, and of each sex; exact."""
    ages = torch.zeros(len(age_edges) + 2, dtype=torch.float64)
    sexes = torch.zeros(len(SEX_NAMES), dtype=torch.float64)
    for patient in patients:
        age, sex = patient.get("age"), patient.get("sex")
        ages[bisect_right(age_edges, age) if isinstance(age, float) and age >= 0 else -1] += 1
        sexes[SEX_NAMES.index(sex) if isinstance(sex, str) and sex in SEX_NAMES else -1] += 1
    return {AGES: ages, SEXES: sexes}


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
