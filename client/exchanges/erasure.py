"""A site's answer to the site erasure: the sums of its patients' content codes and pooled content.

Does not do: fit anything (`meduet_models/content_code.py`).
"""

import logging

import torch

from client.consent.exact_sums import check_means, fewest_for_means
from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork
from client.release import Gate, Released
from client.training.site_state import StateFolder, StateMissing
from client.training.trainee import student_of
from federation.exchanges.erasure import (
    ERASURE,
    ErasureAsk,
    ErasureReply,
    ErasureSums,
    erasure_shapes,
    erasure_tensors,
    numbers_told,
    pooled_bound,
)
from federation.exchanges.survey import smallest_cohort
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.content_code import CodeSums, code_bound
from meduet_models.meduet import layer_normed
from meduet_models.style.moments import CohortTooSmall

_SCANS_AT_ONCE = 16
_log = logging.getLogger(__name__)


def answer_erasure(site: SiteAtWork, ask: ErasureAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """The sums over the training patients, under the run's last weights and the code that came with them; of
    pooled content only where there is a patient for each number of both, or the site agreed.

    Raises `CohortTooSmall` below the minimum, `TooFewForSums` below one patient per number, and `AskRefused`
    when no code came.
    """
    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    try:
        kept = states.before(plan.training.rounds + 1)
    except StateMissing as error:  # what content takes came with the question, but for norm layers at home
        _log.warning("The sums are told with home weights of the plan's seed: %s", error)
        kept = None
    student = student_of(plan, ask.shared, kept).to(site.device).eval()
    if not student.has_content_code:
        raise AskRefused("Expected the axes of a content code; none came.", RefusalKind.MALFORMED)

    scans = site.scans(plan)
    rows = list(scans.indices("train"))
    patients = [scans.patients[row] for row in rows]
    least = smallest_cohort(plan, site.minimum_cohort)
    if (came := len(set(patients))) < least:
        raise CohortTooSmall(f"Expected at least {least} patients behind code sums; got {came}.")
    check_means(came, plan.network.code_size, site.exact_sums)
    chunks = [rows[first : first + _SCANS_AT_ONCE] for first in range(0, len(rows), _SCANS_AT_ONCE)]
    codes, pooled = [], []
    with torch.no_grad():
        for chunk in chunks:
            content = student.encode(scans.latents(chunk).to(site.device)).content
            codes.append(student.coded(content).cpu())
            pooled.append(layer_normed(content).mean(1).cpu())
    size, width = plan.network.code_size, plan.network.width
    sums = CodeSums.of(torch.cat(codes), patients, code_bound(size))
    beside = CodeSums.none(width, pooled_bound(plan))
    if site.exact_sums or came >= fewest_for_means(numbers_told(plan)):
        beside = CodeSums.of(torch.cat(pooled), patients, pooled_bound(plan))
    return gate.release(erasure_tensors(ErasureSums(sums, beside)), erasure_shapes(plan), weight=float(came))


def erasure_mail(released: Released, ask: ErasureAsk, site: str) -> ErasureReply:
    """The reply."""
    return ErasureReply(plan_sha256=ask.plan_sha256, site=site, moments=dict(released.tensors))


ANSWER = Answer(ERASURE, answer_erasure, erasure_mail)
