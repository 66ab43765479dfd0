"""A site's answer with moments: its patients' mean and spread along public axes, as one sum; the gate adds
noise.

However many patients there are, none included, the answer has the same form: a refusal below some number
would tell whether a patient is there. Does not do: add the noise (`client/release.py`).
"""

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork
from client.latents.batches import TrainingScans
from client.release import Gate, Released
from client.scans.patients import rows_by_patient
from federation.exchanges.latent_moments import (
    LATENT_MOMENTS,
    MOMENTS,
    MomentsAsk,
    MomentsReply,
    moments_shapes,
    public_moments,
)
from federation.exchanges.style_code import check_public
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.style.bank import StyleBank
from meduet_models.style.common_style import CommonStyle
from meduet_models.weights import save_weights
from storage.files import private_folder

QUESTION = "latent_moments.safetensors"
"""Name of the file of public scans and protected styles, beside the states."""


def answer_moments(site: SiteAtWork, ask: MomentsAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """The sum of the training patients' shares. Raises `AskRefused` for public scans or a bank that give no
    axes, before a scan is read."""
    try:
        common = CommonStyle.of(StyleBank.from_tensors(ask.bank, plan.sites))
        if site.name not in common.style_bank.present:
            raise ValueError("Expected the protected style of this site in the bank; it has none.")
        axes = public_moments(plan, common, check_public(plan, ask.public))
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    kept = question_path(site.state_dir, ask.plan_sha256)
    private_folder(kept.parent)
    save_weights(kept, {**ask.bank, **ask.public}, {})
    patients = list(patient_latents(site.scans(plan), common, site.name))
    return gate.release({MOMENTS: axes.total(patients)}, moments_shapes(plan), weight=float(len(patients)))


def question_path(state_dir: Path, plan_sha256: str) -> Path:
    """Where what came with the question is kept, for an audit: public scans and protected styles."""
    return state_dir / "state" / plan_sha256[:12] / QUESTION


def patient_latents(scans: TrainingScans, common: CommonStyle, site: str) -> Iterator[Float[Tensor, " d"]]:
    """The mean latents of each training patient, all scans together, in the common style."""
    for rows in rows_by_patient(scans.patients, scans.indices("train")).values():
        yield common.into(scans.latents(rows), site).double().mean(0).flatten()


def moments_mail(released: Released, ask: MomentsAsk, site: str) -> MomentsReply:
    """The reply."""
    return MomentsReply(plan_sha256=ask.plan_sha256, site=site, moments=dict(released.tensors))


ANSWER = Answer(LATENT_MOMENTS, answer_moments, moments_mail)
