"""A site's round of noisy steps.

However many patients there are, none included, the answer has the same form: it is a function of noisy sums.
Does not do: the steps (`client/training/private.py`), or keep anything by itself
(`client/training/site_state.py`) but the plan's public scans.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork, bank_of, before_deadline
from client.exchanges.pretraining import train_mail
from client.latents.group_batches import GroupBatches
from client.latents.public_scans import keep_public, kept_public
from client.release import Gate, Masking, Released
from client.training.canaries import StepCanaries
from client.training.private import step_to_sum, train_privately
from client.training.site_state import StateFolder, StateMissing, cohort_sha256
from client.training.trainee import Trainee
from federation.exchanges.private_rounds import PRIVATE_ROUNDS, PrivateAsk
from federation.plan.plan import RunPlan
from federation.wire.wire import GROWTH, RefusalKind
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip


def answer_private_round(
    site: SiteAtWork,
    ask: PrivateAsk,
    plan: RunPlan,
    gate: Gate,
    on_step: OnStep,
    masking: Masking | None = None,
    keep: Callable[[], None] = lambda: None,
) -> Released:
    """Take a round of noisy steps and release examples · (shared weights after - before).

    As a round of pretraining: the state it began from is never changed, the one after it is on disk
    before the answer leaves. `masking`, `keep`: for a secure sum, whose optimiser is the centre's. Raises
    `AskRefused` for public scans or a bank that are not the plan's, and `StateMissing` where the start is
    to be sent again.
    """
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    home = ask.home
    place = states.enter(ask.round, None if home is None else lambda: home)
    public = _public(site.state_dir, ask, plan)
    trainee = Trainee.of(plan, ask.shared, place.kept, site.device)  # never compiled: hooks are needed
    scans, shared_sha256, noise = site.scans(plan), sha256_of_tensors(ask.shared), gate.step_secrets()
    style_bank = bank_of(plan, ask.bank)
    try:
        if style_bank is None:
            raise ValueError("Expected a bank of protected styles; none came.")
        batches = GroupBatches(scans, plan, style_bank, public, site.name, site.secret)
        canaries = None
        if plan.audit_canaries is not None:
            canaries = StepCanaries(plan, site.secret, style_bank, public, site.name)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    question = {
        "shared_sha256": shared_sha256,
        "bank_sha256": sha256_of_tensors(ask.bank),
        "cohort_sha256": cohort_sha256(scans),
        "noise": noise.fingerprint,
    }
    if masking is None:
        under_way = place.under_way(question, site.progress_every_s)
        result = train_privately(trainee, batches, plan, ask.round, noise, on_step, under_way, canaries)
        room = plan.release.update_clip_norm * GROWTH[plan.release.wire_dtype]
    else:
        result = step_to_sum(trainee, batches, plan, ask.round, noise, on_step)
        room = masking.rounding / result.examples
    return gate.release(
        clip(result.update, plan.release.update_clip_norm - room).value,
        {name: tuple(tensor.shape) for name, tensor in ask.shared.items()},
        weight=float(result.examples),
        counts={"examples": result.examples},
        metrics=result.metrics,
        wire_dtype=plan.release.wire_dtype,
        keep=place.leaving(lambda: trainee.state(plan, ask.round, place.kept.round), shared_sha256, keep),
        masking=masking,
    )


def _public(state_dir: Path, ask: PrivateAsk, plan: RunPlan) -> Tensor:
    """The plan's public scans, as they came or as they were kept; kept now."""
    if ask.public is not None:
        try:
            return keep_public(state_dir, plan, ask.public)
        except ValueError as error:
            raise AskRefused(str(error), RefusalKind.MALFORMED) from error
    if (kept := kept_public(state_dir, plan)) is None:
        raise StateMissing("Expected the plan's public scans; this site does not have them.")
    return kept


ANSWER = Answer(PRIVATE_ROUNDS, answer_private_round, train_mail)
