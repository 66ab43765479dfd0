"""A site's answer to the federated diffusion model: a round of the federated diffusion model on its own
latents.

AdamW's moments (and the alignment's projector, which never travels) stay at the site between rounds, one
state per round; a round that was cut short goes on where it was (`client/training/site_state.py`). Does not
do: know Flower's messages, catch anything, release a latent (`client/exchanges/latents.py`), use held-out
patients.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork, bank_of, before_deadline
from client.exchanges.pretraining import train_mail
from client.latents.examples import ScansWithGeometry, SiteExamples
from client.release import Gate, Released
from client.secrets.site_secret import seed_of
from client.training.site_state import RoundResult, SiteState, StateFolder, UnderWay, cohort_sha256
from client.training.trainee import WrongWeights
from federation.exchanges.diffusion import DIFFUSION, DiffusionAsk, encoder_of, transformer_of
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.training import DiffusionTrainee
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip_factor, joint_norm

_METRICS = {
    "loss": "loss.total",
    "velocity": "loss.velocity",
    "alignment": "loss.alignment",
    "gradient_norm": "grad_norm",
    "learning_rate": "learning_rate",
}
"""What a step tells, and what it is called on the wire."""

_TOLD = "told/"


def answer_diffusion(
    site: SiteAtWork,
    ask: DiffusionAsk,
    plan: RunPlan,
    gate: Gate,
    on_step: OnStep,
) -> Released:
    """Train the diffusion model for a round and release examples · (weights after - before).

    Raises `AskRefused` when the round took longer than the plan's deadline, and `WrongWeights` for another
    model or encoder.
    """
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    diffusion = plan.diffusion
    assert diffusion is not None, "the plan has this question"
    try:
        encoder = encoder_of(plan, ask.encoder).to(site.device)
    except ValueError as error:
        raise WrongWeights(str(error)) from error
    transformer = transformer_of(plan, encoder).to(site.device)
    parameters = dict(transformer.named_parameters())
    came = {name: tuple(tensor.shape) for name, tensor in ask.shared.items()}
    if came != (mine := {name: tuple(p.shape) for name, p in parameters.items()}):
        odd = min(name for name, _ in came.items() ^ mine.items())
        raise WrongWeights(f"Expected the diffusion model of this plan; {odd!r} is another.")

    states = StateFolder(site.state_dir / "diffusion", ask.plan_sha256)
    place = states.enter(ask.round, dict)  # the model comes whole: who lost AdamW's moments starts them anew
    trainee = DiffusionTrainee(
        transformer,
        Conditioner(encoder, maps=plan.volumes.registered),
        diffusion.training,
        total_steps=diffusion.steps(plan.training.rounds),
        seed=seed_of(site.secret, "diffusion", plan.seed),
        style_bank=bank_of(plan, ask.bank),
    )
    if place.kept.optimiser:
        trainee.load(place.kept.optimiser)
    transformer.load_state_dict({**transformer.state_dict(), **ask.shared})

    scans = site.scans(plan)
    if not isinstance(scans, ScansWithGeometry):
        raise AskRefused("Expected a site that keeps the geometry of its scans.", RefusalKind.MALFORMED)
    source = SiteExamples(scans, plan)
    shared_sha256 = sha256_of_tensors(ask.shared)
    question = {
        "shared_sha256": shared_sha256,
        "encoder_sha256": sha256_of_tensors(ask.encoder),
        "bank_sha256": sha256_of_tensors(ask.bank),
        "cohort_sha256": cohort_sha256(scans),
    }
    result = _train(
        trainee,
        source,
        diffusion,
        ask,
        place.under_way(question, site.progress_every_s),
        on_step,
    )
    norm = result.metrics["update_norm"]

    def after() -> SiteState:
        return SiteState(round=ask.round, began_from=place.kept.round, home={}, optimiser=trainee.state())

    return gate.release(
        result.update,
        mine,
        weight=float(result.examples),
        counts={"examples": result.examples},
        metrics=result.metrics | {"clip_factor": clip_factor(norm, gate.promise.bound)},
        wire_dtype=plan.release.wire_dtype,
        keep=place.leaving(after, shared_sha256),
        anew=place.anew,
    )


def _train(
    trainee: DiffusionTrainee,
    source: SiteExamples,
    diffusion: DiffusionPlan,
    ask: DiffusionAsk,
    under_way: UnderWay,
    on_step: OnStep,
) -> RoundResult:
    """The steps of a round, from wherever it is."""
    metrics: dict[str, list[float]] = {}

    def load(tensors: Mapping[str, Tensor]) -> None:
        trainee.load({name: t for name, t in tensors.items() if not name.startswith(_TOLD)})
        metrics.update({n.removeprefix(_TOLD): t.tolist() for n, t in tensors.items() if n.startswith(_TOLD)})

    def tensors() -> dict[str, Tensor]:
        lists = {
            f"{_TOLD}{name}": torch.tensor(values, dtype=torch.float64) for name, values in metrics.items()
        }
        return trainee.state() | lists

    done, spent = under_way.resume(load)
    began = time.perf_counter() - spent
    first = (ask.round - 1) * diffusion.steps_per_round
    for step in range(done, diffusion.steps_per_round):
        for name, value in trainee.step(source, first + step).items():
            metrics.setdefault(name, []).append(value)
        under_way.offer(step + 1, time.perf_counter() - began, tensors)
        on_step(step + 1, metrics["loss"][-1])

    after = trainee.transformer.named_parameters()
    update = {name: parameter.detach().cpu() - ask.shared[name] for name, parameter in after}
    return RoundResult(
        update=update,
        metrics={
            **{_METRICS[name]: sum(values) / len(values) for name, values in metrics.items()},
            "seconds": time.perf_counter() - began,
            "steps": float(diffusion.steps_per_round),
            "update_norm": joint_norm(update),
        },
        examples=len(source),
    )


ANSWER = Answer(DIFFUSION, answer_diffusion, train_mail)
