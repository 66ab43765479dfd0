"""A site's answer to the site erasure: sums of its patients' pooled content.

Does not do: fit anything (`meduet_models/erasure.py`).
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from client.exact_sums import check_sums
from client.exchanges.exchange import Answer, AskRefused, OnStep, Site, bank_of
from client.latents.batches import Batches
from client.release import Gate, Released
from client.training.site_state import StateFolder, StateMissing
from client.training.trainee import student_of
from federation.exchanges.erasure import (
    ERASURE,
    ErasureAsk,
    ErasureReply,
    content_bound,
    erasure_shapes,
    erasure_tensors,
    renders,
)
from federation.exchanges.survey import smallest_cohort
from federation.plan import RunPlan
from federation.wire import RefusalKind
from meduet_models.content_code import RenderingMoments
from meduet_models.erasure import ErasureMoments
from meduet_models.style.moments import CohortTooSmall

_SCANS_AT_ONCE = 16
_log = logging.getLogger(__name__)


def answer_erasure(site: Site, ask: ErasureAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Sums of pooled content over the training patients, under the run's last weights: in their own style,
    and how it varies when they are restyled to every style of the bank.

    Raises `CohortTooSmall` below the minimum, and `TooFewForSums` below ten times the width.
    """
    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    try:
        kept = states.before(plan.training.rounds + 1)
    except StateMissing as error:  # what content takes came with the question, but for norm layers at home
        _log.warning("The sums are told with home weights of the plan's seed: %s", error)
        kept = None
    student = student_of(plan, ask.shared, kept).to(site.device).eval()
    width = plan.network.width
    student.set_erasure(torch.zeros(width), torch.eye(width))  # before any site erasure, whatever came

    scans = site.scans(plan)
    rows = list(scans.indices("train"))
    patients = [scans.patients[row] for row in rows]
    least = smallest_cohort(plan, site.minimum_cohort)
    if (came := len(set(patients))) < least:
        raise CohortTooSmall(f"Expected at least {least} patients behind content sums; got {came}.")
    check_sums(came, width, site.exact_sums)

    def content(read: Callable[[list[int]], Tensor]) -> Tensor:
        chunks = [rows[first : first + _SCANS_AT_ONCE] for first in range(0, len(rows), _SCANS_AT_ONCE)]
        with torch.no_grad():
            return torch.cat([student.pooled_content(read(chunk).to(site.device)).cpu() for chunk in chunks])

    bound = content_bound(plan)
    moments = ErasureMoments.of(content(scans.latents), patients, bound)
    renderings = None
    if renders(plan):
        batches = Batches(scans, plan, bank_of(plan, ask.bank))
        contents = [content(lambda chunk, s=s: batches.in_style(chunk, s)) for s in batches.styles]  # type: ignore[misc]
        if not contents:
            raise AskRefused("Expected the run's style bank; got an empty one.", RefusalKind.MALFORMED)
        renderings = RenderingMoments.of(torch.stack(contents), patients, bound)
    return gate.release(erasure_tensors(moments, renderings), erasure_shapes(plan), weight=float(came))


def erasure_mail(released: Released, ask: ErasureAsk, site: str) -> ErasureReply:
    """The reply."""
    return ErasureReply(plan_sha256=ask.plan_sha256, site=site, moments=dict(released.tensors))


ANSWER = Answer(ERASURE, answer_erasure, erasure_mail)
