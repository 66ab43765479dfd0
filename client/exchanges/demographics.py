"""A site's answer to demographics: its training patients by age and by sex, in whole minimum cohorts.

From the covariates of the site's own tables (`age` in years, `sex` as F or M); whoever has none is not known.
Does not do: tell anything of a band with fewer patients than the minimum cohort.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from client.exchanges.exchange import Answer, OnStep, Site
from client.latents.batches import TrainingScans
from client.release import Gate, Released
from federation.exchanges.demographics import (
    AGES,
    DEMOGRAPHICS,
    SEX_NAMES,
    SEXES,
    DemographicsAsk,
    DemographicsReply,
    demographics_shapes,
)
from federation.exchanges.survey import smallest_cohort
from federation.plan import RunPlan
from meduet_models.style.moments import CohortTooSmall


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


def counted(patients: Sequence[Mapping[str, str | float]], age_edges: Sequence[float]) -> dict[str, Tensor]:
    """How many of these patients are in each band of ages, and of each sex; exact."""
    ages = torch.zeros(len(age_edges) + 2, dtype=torch.float64)
    sexes = torch.zeros(len(SEX_NAMES), dtype=torch.float64)
    for patient in patients:
        age, sex = patient.get("age"), patient.get("sex")
        ages[bisect_right(age_edges, age) if isinstance(age, float) and age >= 0 else -1] += 1
        sexes[SEX_NAMES.index(sex) if isinstance(sex, str) and sex in SEX_NAMES else -1] += 1
    return {AGES: ages, SEXES: sexes}


def in_whole_cohorts(counts: Tensor, least: int) -> Tensor:
    """Each count rounded down to a multiple of `least`.

    Guarantee: a band of fewer than `least` patients is told as empty, and one patient more or less changes a
    band's count for one in `least` sizes of it. Not covered: those sizes; it is not differential privacy.
    """
    return (counts / least).floor() * least


def demographics_mail(released: Released, ask: DemographicsAsk, site: str) -> DemographicsReply:
    """The reply."""
    return DemographicsReply(plan_sha256=ask.plan_sha256, site=site, counts=dict(released.tensors))


ANSWER = Answer(DEMOGRAPHICS, answer_demographics, demographics_mail)
