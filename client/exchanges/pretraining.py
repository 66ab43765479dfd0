"""A site's round of pretraining.

Does not do: the steps (`client/training/pretraining.py`), or keep anything by itself
(`client/training/site_state.py`).
"""

from collections.abc import Callable, Mapping
from functools import cache

from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork, bank_of, before_deadline
from client.latents.batches import Batches, TrainingScans
from client.latents.style_moments import own_moments
from client.release import Gate, Masking, Released
from client.training.pretraining import train_round
from client.training.site_state import StateFolder, cohort_sha256
from client.training.style_axes import with_style_axes
from client.training.trainee import Trainee
from federation.exchanges.pretraining import PRETRAINING, TrainAsk, TrainReply, start_sha256
from federation.plan.plan import RunPlan
from federation.wire.messages import Ask
from federation.wire.wire import RefusalKind
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip_factor


def answer_round(
    site: SiteAtWork,
    ask: TrainAsk,
    plan: RunPlan,
    gate: Gate,
    on_step: OnStep,
    masking: Masking | None = None,
    keep: Callable[[], None] = lambda: None,
) -> Released:
    """Train a round and release examples · (shared weights after - before).

    The state that the round began from is never changed, and the one after it is on disk before the answer
    leaves; a round that a killed process left goes on where it was. `masking`: for a secure sum, in which a
    site weighs as many examples as the plan's cap at most; `keep`: what else must be on disk then. Raises
    `AskRefused` when the round does not end within `DEADLINE_SHARE` of the plan's deadline, and, before a
    scan is read, when round 1 does not begin with the plan's start from public anatomy.
    """
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    if ask.round == 1 and plan.anatomy_sha256 is not None:
        _check_start(plan, {**(ask.home or {}), **ask.shared})

    def start() -> dict[str, Tensor]:
        assert ask.home is not None
        if plan.aggregation.method == "alone":
            return _own_scale(ask.home, site.scans(plan), plan)
        return with_style_axes(ask.home, ask.shared, batches, plan)

    style_bank = bank_of(plan, ask.bank)

    @cache
    def batches() -> Batches:
        return Batches(site.scans(plan), plan, style_bank)

    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    place = states.enter(ask.round, None if ask.home is None else start)
    trainee = Trainee.of(plan, ask.shared, place.kept, site.device, site.compile)

    shared_sha256 = sha256_of_tensors(ask.shared)
    question = {
        "shared_sha256": shared_sha256,
        "bank_sha256": sha256_of_tensors(ask.bank),
        "cohort_sha256": cohort_sha256(site.scans(plan)),
    }
    result = train_round(
        trainee,
        batches(),
        plan,
        ask.round,
        site.secret,
        place.start.home,
        on_step,
        place.under_way(question, site.progress_every_s),
    )
    norm = result.metrics["update_norm"]
    examples = result.examples if masking is None else min(result.examples, plan.aggregation.weight_cap)

    return gate.release(
        result.update,
        {name: tuple(tensor.shape) for name, tensor in ask.shared.items()},
        weight=float(examples),
        counts={"examples": examples},
        metrics=result.metrics | {"clip_factor": clip_factor(norm, gate.promise.bound)},
        wire_dtype=plan.release.wire_dtype,
        keep=place.leaving(lambda: trainee.state(plan, ask.round, place.kept.round), shared_sha256, keep),
        anew=place.anew and masking is None,
        masking=masking,
    )


def train_mail(released: Released, ask: Ask, site: str) -> TrainReply:
    """The reply to any round of training: a vector of sums, and what the round was in numbers, under the hash
    of what was agreed to."""
    return TrainReply(
        plan_sha256=released.record["plan"],
        site=site,
        round=released.record["round"],
        examples=released.counts["examples"],
        update=dict(released.tensors),
        metrics=dict(released.metrics),
        wire_dtype=released.wire_dtype,
    )


def _check_start(plan: RunPlan, weights: Mapping[str, Tensor]) -> None:
    if (came := start_sha256(weights, plan.release.wire_dtype)) != plan.anatomy_sha256:
        raise AskRefused(
            f"Expected the plan's start from public anatomy, {str(plan.anatomy_sha256)[:12]}…; round 1 came "
            f"with {came[:12]}…. Ask the centre for the start that was approved.",
            RefusalKind.PLAN_NOT_ACCEPTED,
        )


def _own_scale(home: dict[str, Tensor], scans: TrainingScans, plan: RunPlan) -> dict[str, Tensor]:
    """The start of a site that is alone: nobody told it the latent scale, so it takes its own."""
    mean, deviation = own_moments(scans, plan).latent_scale()
    return home | {"latent_mean": mean, "latent_deviation": deviation}


ANSWER = Answer(PRETRAINING, answer_round, train_mail)
