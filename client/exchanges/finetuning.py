"""A site's answer to a fine-tuning: a round of federated fine-tuning with its own labels.

Nothing is kept between rounds, nor within one (they are short): the weights come with the question, and AdamW
starts anew. Whose labels are used, where the plan asks for a share, and who is in which batch, is drawn from
the site's secret. With privacy the answer has the same form however many labelled patients there are, none
included: it is a function of noisy sums. Does not do: know Flower's messages, catch anything, use held-out
patients.
"""

import logging
import math
import time

from client.exchanges.exchange import AskRefused, OnStep, SiteAtWork, before_deadline
from client.latents.batches import FEWEST_SCANS
from client.latents.labelled import (
    LabelledScans,
    NoLabels,
    ScansWithLabels,
    ScansWithVolumes,
    labelled_scans,
)
from client.release import Gate, Released
from client.secrets.site_secret import seed_of
from client.training.finetuning import check_answers, finetune
from client.training.private_finetuning import answerable, finetune_privately
from client.training.trainee import WrongWeights
from federation.exchanges.finetuning import FinetuneAsk, FinetunePlan
from federation.plan.finetuning_privacy import protection_of
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from meduet_models.downstream.networks import encoder_tensors, trained_keys
from meduet_models.downstream.starting import StartedNetwork, starting_network
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from meduet_models.style.moments import CohortTooSmall
from meduet_models.weights import sha256_of_tensors
from privacy.clipping import clip, clip_factor, joint_norm
from privacy.sample_gradients import check_asks_alone

_log = logging.getLogger(__name__)


def answer_finetuning(
    site: SiteAtWork,
    ask: FinetuneAsk,
    plan: RunPlan,
    gate: Gate,
    on_step: OnStep,
) -> Released:
    """Fine-tune a round and release examples · (trained weights after - before).

    Raises `AskRefused` when a label is not one of the plan's, `WrongWeights` for another
    pretrained encoder, `NoLabels`, and `CohortTooSmall` below four labelled patients; with privacy none of
    these for what a patient's scans hold.
    """
    on_step = before_deadline(plan.aggregation.deadline_s, on_step)
    finetuning = ask.finetuning(plan)
    network = network_of(plan, finetuning, ask)
    if finetuning.privacy is not None:
        return _answer_privately(site, ask, plan, finetuning, network, gate, on_step)

    scans = _scans_of(site, plan)
    if finetuning.local.sees_volumes and not (
        isinstance(scans, ScansWithVolumes) and plan.volumes.extent == "crop"
    ):
        raise AskRefused("Expected crops whose volumes can be prepared again.", RefusalKind.PLAN_NOT_ACCEPTED)
    found = labelled_scans(
        scans,
        scans.indices("train"),
        finetuning.local,
        finetuning.target,
        finetuning.target_values,
        plan.volumes if finetuning.local.sees_volumes else None,
    ).share(finetuning.label_share, seed_of(site.secret, "labels", finetuning.seed))
    if (came := len(found.patients)) < FEWEST_SCANS:
        raise CohortTooSmall(f"Expected labels of at least {FEWEST_SCANS} patients; got {came}.")
    try:
        check_answers(task_of(finetuning.local.task), found, finetuning.local.classes)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.PLAN_NOT_ACCEPTED) from error

    network = network.to(site.device)
    local = finetuning.local
    done = finetune(
        network,
        found,
        local,
        seed=seed_of(site.secret, "finetuning", finetuning.seed),
        first_step=(ask.round - 1) * local.steps,
        total_steps=finetuning.rounds * local.steps,
        crop_foreground=plan.volumes.crop_foreground,
        on_step=on_step,
    )
    after = dict(network.named_parameters())
    update = {name: after[name].detach().cpu() - before for name, before in ask.shared.items()}
    norm = joint_norm(update)
    return gate.release(
        update,
        {name: tuple(tensor.shape) for name, tensor in ask.shared.items()},
        weight=float(len(found)),
        counts={"examples": len(found)},
        metrics={
            "loss.total": sum(done.losses) / len(done.losses),
            "seconds": done.seconds,
            "steps": float(local.steps),
            "update_norm": norm,
            "clip_factor": clip_factor(norm, gate.promise.bound),
        },
    )


def _answer_privately(
    site: SiteAtWork,
    ask: FinetuneAsk,
    plan: RunPlan,
    finetuning: FinetunePlan,
    network: StartedNetwork,
    gate: Gate,
    on_step: OnStep,
) -> Released:
    """A round of noisy steps: expected patients · (trained weights after - before), and whole seconds."""
    try:
        check_asks_alone(task_of(finetuning.local.task), network)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.PLAN_NOT_ACCEPTED) from error
    found, noise = _answerable(_scans_of(site, plan), finetuning), gate.step_secrets()
    began = time.perf_counter()
    finetune_privately(
        network.to(site.device),
        found,
        finetuning,
        ask.round,
        noise,
        crop_foreground=plan.volumes.crop_foreground,
        on_step=on_step,
    )
    after = dict(network.named_parameters())
    update = {name: after[name].detach().cpu() - before for name, before in ask.shared.items()}
    examples = protection_of(finetuning).expected_patients
    return gate.release(
        clip(update, finetuning.update_clip_norm).value,
        {name: tuple(tensor.shape) for name, tensor in ask.shared.items()},
        weight=float(examples),
        counts={"examples": examples},
        metrics={
            "seconds": float(math.ceil(time.perf_counter() - began)),
            "steps": float(finetuning.local.steps),
        },
    )


def _answerable(scans: ScansWithLabels, finetuning: FinetunePlan) -> LabelledScans | None:
    """The labelled scans that noisy steps learn from; what is left out is said here, and does not leave."""
    local, rows = finetuning.local, scans.indices("train")
    try:
        known = labelled_scans(scans, rows, local, finetuning.target, finetuning.target_values)
    except NoLabels:
        _log.warning("None of %d scans has a label; the steps are made of noise.", len(rows))
        return None
    found = answerable(task_of(local.task), known, local.classes)
    if left_out := len(known) - (0 if found is None else len(found)):
        _log.warning("%d of %d labels are none of the plan's; their scans rest.", left_out, len(known))
    return found


def _scans_of(site: SiteAtWork, plan: RunPlan) -> ScansWithLabels:
    scans = site.scans(plan)
    if not isinstance(scans, ScansWithLabels):
        raise AskRefused("Expected a site that keeps labels with its scans.", RefusalKind.NO_LABELS)
    return scans


def network_of(plan: RunPlan, finetuning: FinetunePlan, ask: FinetuneAsk) -> StartedNetwork:
    """The network with the weights that came, checked against the fine-tuning plan's hash where they are
    still the pretrained ones. Raises `WrongWeights`."""
    local = finetuning.local
    trainable = local.encoder == "finetuned"
    network = starting_network(
        task_of(local.task), local.network, FactorNetwork(plan.network), local.classes, trainable=trainable
    )
    trained = trained_keys(network)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    came = {name: tuple(tensor.shape) for name, tensor in {**ask.fixed, **ask.shared}.items()}
    if expected != came or set(trained) != set(ask.shared):
        odd = {name for name, _ in expected.items() ^ came.items()} or set(trained) ^ set(ask.shared)
        raise WrongWeights(f"Expected the weights of this fine-tuning; {min(odd)!r} is another.")
    encoder = encoder_tensors({**ask.fixed, **ask.shared})
    untouched = not trainable or ask.round == 1
    if untouched and sha256_of_tensors(encoder) != finetuning.pretrained_sha256:
        raise WrongWeights(
            f"Expected the pretrained encoder {finetuning.pretrained_sha256[:12]}; other weights came. "
            "Nothing was read."
        )
    network.load_state_dict({**ask.fixed, **ask.shared})
    return network
