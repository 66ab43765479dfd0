"""A site's answer to demographics: its training patients by age and by sex, in whole minimum cohorts.

From the covariates of the site's own tables (`age` in years, `sex` as F or M); whoever has none is not known.
Does not do: tell anything of a band with fewer patients than the minimum cohort.
"""

from collections.abc import Mapping

from client.exchanges.exchange import Answer, OnStep, Site
from client.latents.batches import TrainingScans
from client.release import Gate, Released
from federation.exchanges.demographics import (
    DEMOGRAPHICS,
    DemographicsAsk,
    DemographicsReply,
    counted,
    demographics_shapes,
)
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from meduet_models.style.moments import CohortTooSmall
from privacy.whole_cohorts import in_whole_cohorts


def answer_demographics(
    site: Site, ask: DemographicsAsk, plan: RunPlan, gate: Gate, on_step: OnStep
) -> Released:
    """Counts of the training patients. Raises `CohortTooSmall` below the minimum."""
    assert plan.demographics is not None, "a question that the plan does not have is refused before"
    patients = covariates_of_patients(site.scans(plan))
    least = smallest_cohort(plan, site.minimum_cohort)
    if len(patients) < least:
        raise CohortTooSmall(f"Expected at least {least} patients behind counts; got {len(patients)}.")
    exact = counted(list(patients.values()), plan.demographics.age_edges)
    counts = {name: in_whole_cohorts(tensor, least) for name, tensor in exact.items()}
    return gate.release(counts, demographics_shapes(plan), weight=float(len(patients)))


def covariates_of_patients(scans: TrainingScans) -> dict[str, Mapping[str, str | float]]:
    """What is known of each training patient, by the first of her scans."""
    found: dict[str, Mapping[str, str | float]] = {}
    for row in scans.indices("train"):
        found.setdefault(scans.patients[row], dict(scans.covariates[row]))
    return found


def demographics_mail(released: Released, ask: DemographicsAsk, site: str) -> DemographicsReply:
    """The reply."""
    return DemographicsReply(plan_sha256=ask.plan_sha256, site=site, counts=dict(released.tensors))


ANSWER = Answer(DEMOGRAPHICS, answer_demographics, demographics_mail)
