"""The centre of a federated fine-tuning: rounds over the sites' labels, resumable anywhere.

Starts from the pretrained encoder and a head from the plan's seed. The rounds are those of
`strategies/content_share.py` with another task, so the run's rule, tolerance, quorum and server optimiser
hold here too; what is averaged is what is trained, with a frozen encoder the head alone. What this file does
not do: it trains nothing, sees no label, chooses no best round: sites tell no validation score, as few
patients would be behind one.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from federation.exchanges.finetuning import (
    FINETUNING,
    UNMASKED,
    FinetuneAsk,
    FinetunePlan,
    check_sees_volumes,
)
from federation.journal import Journal
from federation.plan.finetuning_privacy import check_worth, worth_of
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from meduet_models.anatomy_start import AnatomyStart
from meduet_models.downstream.kinds import NetworkKind
from meduet_models.downstream.networks import trained_keys
from meduet_models.downstream.starting import StartedNetwork, start_sha256, starting_network
from meduet_models.downstream.tasks import task_of
from meduet_models.meduet import FactorNetwork
from meduet_models.published.expiry import EXPIRES, check_unexpired
from meduet_models.published.pretrained import MODEL, Pretrained, load_pretrained
from meduet_models.weights import save_weights, sha256_of_tensors
from privacy.worth import LITTLE
from server.checkpoints import Checkpoint, Checkpoints
from server.observer import RoundObserver
from server.run_folder import claim, write_metrics
from strategies.content_share import ContentShare, Task
from strategies.quorum import Roster, SiteOf

FINETUNED = "finetuned.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetunedRun:
    """A complete federated fine-tuning."""

    network: StartedNetwork
    """After the last round, on the CPU."""
    rounds: tuple[dict[str, Any], ...]
    """One report per round: as in `metrics.json` of a run."""
    path: Path
    """The file of the weights."""


def pretrained_of(path: Path) -> Pretrained:
    """The final weights of a run, from its folder or from the file itself; raises `ValueError`."""
    return load_pretrained(path / MODEL if path.is_dir() else path)


def pretrained_sha256(
    network: FactorNetwork,
    kind: NetworkKind = "tokens",
    anatomy_start: AnatomyStart = "none",
    seed: int = 0,
    anatomy: Path | None = None,
) -> str:
    """Hash that a `FinetunePlan` names what it starts from by: the encoder of `network`, a U-Net's start, or
    both."""
    of_segmentation = task_of("segmentation")  # the head is not in the hash, and all tasks have one encoder
    return start_sha256(
        starting_network(
            of_segmentation,
            kind,
            network,
            2,
            trainable=False,
            seed=seed,
            anatomy_start=anatomy_start,
            anatomy=anatomy,
        )
    )


def run_finetuning(
    grid: Grid,
    plan: RunPlan,
    finetuning: FinetunePlan,
    pretrained: FactorNetwork,
    folder: Path,
    *,
    observer: RoundObserver | None = None,
    site_of: SiteOf | None = None,
    anatomy: Path | None = None,
) -> FinetunedRun:
    """Fine-tune `pretrained` in `folder`, or go on with what is there.

    `site_of` says which site a node is registered as; none: as in a simulation. `anatomy`: the file of the
    start from public anatomy that the plan names; none: the shipped one.
    Raises `ValueError` when `pretrained` is not the encoder that `finetuning` names, or the run's updates
    leave in secure sums only, noise drowns the steps, or the run's releases have expired, `OtherPlan` when
    the folder holds another fine-tuning or a run, and `RoundFailed` below the quorum (the last checkpoint
    stays).
    """
    check_unexpired(plan.release.expires, "a pretrained encoder")
    observer = observer or RoundObserver()
    local = finetuning.local
    if plan.aggregation.secure_sum:
        raise ValueError(UNMASKED)
    if finetuning.run_sha256 != plan.sha256:
        raise ValueError(f"Expected a fine-tuning of run {plan.sha256[:12]}; it names another.")
    check_sees_volumes(local, plan)
    network = starting_network(
        task_of(local.task),
        local.network,
        pretrained,
        local.classes,
        trainable=local.encoder == "finetuned",
        seed=finetuning.seed,
        anatomy_start=finetuning.anatomy_start,
        anatomy=anatomy,
    )
    if (found := start_sha256(network)) != finetuning.pretrained_sha256:
        raise ValueError(
            f"Expected the pretrained encoder {finetuning.pretrained_sha256[:12]}; got {found[:12]}."
        )
    start = network.state_dict()
    names = trained_keys(network)
    if finetuning.privacy is not None:
        worth = worth_of(finetuning, len(plan.participants), sum(start[name].numel() for name in names))
        check_worth(finetuning, worth)
        if worth < LITTLE:
            _log.warning("Signal to noise of a step: at most %.3f; below %g it helps little.", worth, LITTLE)
    fixed = {name: tensor for name, tensor in start.items() if name not in names}
    plan_json, finetuning_json = plan.to_json(), finetuning.to_json()

    def question(round_number: int, start: bool) -> RecordDict:
        return FinetuneAsk(
            plan_json=plan_json, finetuning_json=finetuning_json, round=round_number, shared={}, fixed=fixed
        ).to_record()

    task = Task(
        message_type=FINETUNING.route,
        sha256=finetuning.sha256,
        rounds=finetuning.rounds,
        max_norm=finetuning.update_clip_norm,
        question=question,
        wire_dtype="float32",  # a site knows the pretrained encoder by the hash of its very bits
    )
    claim(folder, finetuning)
    checkpoints = Checkpoints(folder / "checkpoints", finetuning.sha256)
    journal = Journal(folder / "journal.jsonl")
    last = checkpoints.latest() or Checkpoint(
        plan_sha256=finetuning.sha256,
        round=0,
        shared={name: start[name].clone() for name in names},
        optimiser={},
        metrics={"rounds": []},
    )
    if last.round == 0:
        checkpoints.save(last)
    strategy = ContentShare(
        plan,
        last.shared,
        task,
        roster=Roster(plan.participants, site_of),
        folder=folder,
        book=ReplyBook(journal),
        on_reply=observer.on_site_reply,
    )
    strategy.optimiser.load(last.optimiser)
    rounds = strategy.rounds(grid, done=last.round)
    for round_number in range(last.round + 1, finetuning.rounds + 1):
        observer.on_round_start(round_number, finetuning.rounds)
        report = dataclasses.asdict(next(rounds))
        observer.on_round_end(round_number, strategy.shared, report)
        last = Checkpoint(
            plan_sha256=finetuning.sha256,
            round=round_number,
            shared=dict(strategy.shared),
            optimiser=strategy.optimiser.state(),
            metrics={"rounds": [*last.metrics["rounds"], report]},
        )
        checkpoints.save(last)
        write_metrics(folder, last.metrics)
        journal.append({"kind": "finetuning", "plan": finetuning.sha256, **report})
    network.load_state_dict({**fixed, **last.shared})
    path, tensors = folder / FINETUNED, network.state_dict()
    sha256 = sha256_of_tensors(tensors)
    header = {"finetuning": finetuning_json, "plan": plan_json, "tensors_sha256": sha256}
    save_weights(path, tensors, header | {EXPIRES: plan.release.expires})
    journal.append({"kind": "end", "plan": finetuning.sha256, "tensors_sha256": sha256})
    observer.on_complete()
    write_metrics(folder, last.metrics | {"final": {}})
    return FinetunedRun(network.eval(), tuple(last.metrics["rounds"]), path)
