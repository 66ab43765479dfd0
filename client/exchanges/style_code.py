"""A site's answer to the style code: its patients' styles as one sum along public axes; the gate adds noise.

However many patients there are, none included, the answer has the same form: a refusal below some number
would tell whether a patient is there. Where the plan has canaries, those whose coin says so are added to the
sum of the patients. Does not do: add the noise (`client/release.py`).
"""

import logging
from collections.abc import Iterator

import torch
from jaxtyping import Float64
from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork
from client.latents.batches import TrainingScans
from client.latents.public_scans import keep_public
from client.release import Gate, Released
from client.scans.patients import rows_by_patient
from federation.canaries import coins, style_shares
from federation.exchanges.style_code import (
    CODE,
    STYLE_CODE,
    StyleCodeAsk,
    StyleCodeReply,
    check_public,
    code_shapes,
    privacy_of,
    style_code,
)
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.style.code import entry_of_scans, style_length, vector_of

_log = logging.getLogger(__name__)


def answer_style_code(
    site: SiteAtWork, ask: StyleCodeAsk, plan: RunPlan, gate: Gate, on_step: OnStep
) -> Released:
    """The sum of the shares of the training patients, and of canaries. Raises `AskRefused` for public scans
    that give no axes."""
    try:
        code = style_code(plan, check_public(plan, ask.public))
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    vectors = list(patient_styles(site.scans(plan), plan))
    if plan.audit_canaries is not None:
        keep_public(site.state_dir, plan, ask.public)
    inside = () if plan.audit_canaries is None else coins(site.secret, plan, "style_code")
    total = code.total(vectors) + style_shares(inside, privacy_of(plan).style_dimensions)
    return gate.release({CODE: total}, code_shapes(plan), weight=float(len(vectors) + sum(inside)))


def patient_styles(scans: TrainingScans, plan: RunPlan) -> Iterator[Float64[Tensor, " s"]]:
    """The style of each training patient, all scans together; NaN for one whose scans are not finite."""
    layout = survey_layout(plan)
    for mine in rows_by_patient(scans.patients, scans.indices("train")).values():
        try:
            yield vector_of(entry_of_scans(scans.latents(mine), layout))
        except ValueError:
            _log.warning("A patient whose latents are not finite is left out of the style code.")
            numbers = style_length(layout.channels, layout.map_grid)
            yield torch.full((numbers,), torch.nan, dtype=torch.float64)


def style_code_mail(released: Released, ask: StyleCodeAsk, site: str) -> StyleCodeReply:
    """The reply."""
    return StyleCodeReply(plan_sha256=ask.plan_sha256, site=site, code=dict(released.tensors))


ANSWER = Answer(STYLE_CODE, answer_style_code, style_code_mail)
