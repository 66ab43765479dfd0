"""A site's round of pretraining.

Does not do: the steps (`client/training/pretraining.py`), or keep anything by itself
(`client/training/site_state.py`).
"""

from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, Site, bank_of, before_deadline, no_step
from client.latents.batches import Batches, TrainingScans
from client.latents.style_moments import own_moments
from client.partial_round import cohort_sha256
from client.release import Gate, Released
from client.training.pretraining import train_round
from client.training.site_state import StateFolder
from client.training.trainee import Trainee
from federation.exchanges.diffusion import DiffusionAsk
from federation.exchanges.pretraining import PRETRAINING, TrainAsk, TrainReply
from federation.plan import RunPlan
from federation.wire import RefusalKind
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip_factor


def answer_round(site: Site, ask: TrainAsk, plan: RunPlan, on_step: OnStep = no_step) -> Released:
    """Train a round and release examples · (shared weights after - before).

    The state that the round began from is never changed: asked again, the site answers the same, from what it
    kept if it was done, and goes on where a process that was killed left the round. Raises `AskRefused` when
    the round is not one of the plan's or does not end within `DEADLINE_SHARE` of the plan's deadline.
    """
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    site.accept(plan)
    if ask.round not in PRETRAINING.rounds(plan):
        raise AskRefused(
            f"Expected a round from 1 to {plan.training.rounds}; got round {ask.round}.",
            RefusalKind.MALFORMED,
        )
    promise = PRETRAINING.promise(plan, ask)
    reservation = site.ledger.reserve(ask.plan_sha256, ask.round, promise)

    states = StateFolder(site.state_dir / "state", ask.plan_sha256)
    if ask.home is not None and (ask.round == 1 or not states.rounds()):  # else it is old news
        alone = plan.aggregation.method == "alone"
        states.begin(_own_scale(ask.home, site.scans(plan), plan) if alone else ask.home)
    kept = states.before(ask.round)
    trainee = Trainee.of(plan, ask.shared, kept, site.device, site.compile)

    scans, shared_sha256 = site.scans(plan), sha256_of_tensors(ask.shared)
    question = {
        "shared_sha256": shared_sha256,
        "bank_sha256": sha256_of_tensors(ask.bank),
        "cohort_sha256": cohort_sha256(scans),
    }
    keep = states.result(ask.round, kept, question)
    before = keep.read()
    result = before or train_round(
        trainee,
        Batches(scans, plan, bank_of(plan, ask.bank)),
        plan,
        ask.round,
        plan.participants.index(site.name),
        states.start().home,
        on_step,
        states.partial(ask.round, kept, question, site.progress_every_s),
    )
    norm = result.metrics["update_norm"]
    released = Gate(site.ledger, site.journal).release(
        reservation,
        result.update,
        {name: tuple(tensor.shape) for name, tensor in ask.shared.items()},
        weight=float(result.examples),
        counts={"examples": result.examples},
        metrics=result.metrics | {"clip_factor": clip_factor(norm, promise.bound)},
        wire_dtype=plan.release.wire_dtype,
    )
    if before is None:
        states.save(trainee.state(plan, ask.round, kept.round), shared_sha256)
        keep.write(result)
    return released


def train_mail(released: Released, ask: TrainAsk | DiffusionAsk, site: str) -> TrainReply:
    """The reply: a vector of sums, and what the round was in numbers."""
    return TrainReply(
        plan_sha256=ask.plan_sha256,
        site=site,
        round=released.record["round"],
        examples=released.counts["examples"],
        update=dict(released.tensors),
        metrics=dict(released.metrics),
        wire_dtype=released.wire_dtype,
    )


def _own_scale(home: dict[str, Tensor], scans: TrainingScans, plan: RunPlan) -> dict[str, Tensor]:
    """The start of a site that is alone: nobody told it the latent scale, so it takes its own."""
    mean, deviation = own_moments(scans, plan).latent_scale()
    return home | {"latent_mean": mean, "latent_deviation": deviation}


ANSWER = Answer(PRETRAINING, answer_round, train_mail)
