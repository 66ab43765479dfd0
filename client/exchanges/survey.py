"""A site's answer to the survey: sums that describe the appearance of its training scans.

Does not do: compute them (`client/latents/style_moments.py`).
"""

from client.exchanges.exchange import Answer, OnStep, SiteAtWork
from client.latents.style_moments import survey
from client.release import Gate, Released
from federation.exchanges.survey import SURVEY, SurveyAsk, SurveyReply, survey_layout
from federation.plan.plan import RunPlan


def answer_survey(site: SiteAtWork, ask: SurveyAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Sums that describe the appearance of the training scans. Raises `CohortTooSmall` below the minimum."""
    scans = site.scans(plan)
    moments = survey(scans, plan, site.minimum_cohort)
    rows = scans.indices("train")
    num_patients = len({scans.patients[row] for row in rows})
    return gate.release(
        moments.to_tensors(),
        survey_layout(plan).shapes(),
        weight=float(num_patients),
        counts={"num_patients": num_patients, "num_scans": len(rows)},
        not_covered=frozenset({"count"}),
    )


def survey_mail(released: Released, ask: SurveyAsk, site: str) -> SurveyReply:
    """The reply."""
    return SurveyReply(
        plan_sha256=ask.plan_sha256,
        site=site,
        moments=dict(released.tensors),
        num_patients=released.counts["num_patients"],
        num_scans=released.counts["num_scans"],
    )


ANSWER = Answer(SURVEY, answer_survey, survey_mail)
