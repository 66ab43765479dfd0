"""The survey: before round 1 every site tells the sums that describe its scans' appearance.

The one place where site and centre take the layout of style sums from.
What this file does not do: it computes no sums (`client/latents/style_moments.py`) and judges none
(`strategies/style_bank.py`).
"""

from dataclasses import dataclass

import torch

from federation.exchanges.exchange import Exchange
from federation.plan.plan import RunPlan
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Reply, Tensors
from meduet_models.style.moments import StyleLayout
from privacy.promise import Promise


@dataclass(frozen=True, kw_only=True)
class SurveyAsk(Ask, kind="survey_ask"):
    """Before round 1: tell the sums that describe your scans' appearance."""


@dataclass(frozen=True, kw_only=True)
class SurveyReply(Reply, kind="survey_reply"):
    """A site's appearance as sums over its patients, and its size."""

    moments: Tensors
    num_patients: int
    num_scans: int


def survey_layout(plan: RunPlan) -> StyleLayout:
    """Names, shapes and per-patient bound of the style sums that the plan asks for.

    The coarse map, and the centre of every voxel where the plan wants it, are there only for registered
    crops. With `style.exchange:
    none` the sums still travel, but only their pooled centre and scale come back.
    """
    return StyleLayout(
        channels=plan.network.latent_channels,
        latent_grid=plan.network.latent_grid,
        map_grid=plan.style.map_grid if plan.volumes.registered else None,
        bound=plan.release.style_clip,
        parts=max(1, len(plan.style.body_parts)),
        amplitude=plan.style.exchange == "amplitude",
        centre=plan.style.centre == "full",
    )


def largest_survey(plan: RunPlan, ask: SurveyAsk) -> Largest:
    """Size of a site's answer to the survey, at most."""
    return largest_reply(promised(survey_layout(plan).shapes(), torch.float32))


def smallest_cohort(plan: RunPlan, site_minimum: int = 0) -> int:
    """Fewest patients behind sums that may leave a site: the stricter of plan and site, and never one
    patient.
    """
    return max(plan.style.minimum_cohort, site_minimum, 2)


def style_promise(plan: RunPlan) -> Promise:
    """One patient's style sums are bounded where they are made."""
    return Promise(
        kind="survey", bound=plan.release.style_clip, unit="patient statistics", enforcement="check"
    )


def survey_promise(plan: RunPlan, ask: SurveyAsk) -> Promise:
    """There is one survey."""
    return style_promise(plan)


SURVEY = Exchange(
    route="query.survey",
    ask=SurveyAsk,
    reply=SurveyReply,
    rounds=lambda plan: range(plan.aggregation.method != "alone" and plan.privacy is None),
    largest=largest_survey,
    promise=survey_promise,
)
