"""The centre of a federated fine-tuning: rounds over the sites' labels, resumable anywhere.

Starts from the pretrained encoder and a head from the plan's seed; each round asks every site, folds each
valid reply into an exact sum as it arrives, and writes the weights down before the next round. With a frozen
encoder only the head is trained, travels back and is averaged. The quorum rule is the run's. What this file
does not do: it trains nothing, sees no label, chooses no best round: sites tell no validation score, as few
patients would be behind one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from federation.exchanges.finetuning import FINETUNING, FinetuneAsk, FinetunePlan, FinetuneReply
from federation.journal import Journal
from federation.limits import MOST_SCANS
from federation.messages import Tensors
from federation.plan import RunPlan
from federation.reply_book import ReplyBook
from meduet_models.downstream import (
    ClassificationNetwork,
    SegmentationNetwork,
    encoder_tensors,
    trained_keys,
    with_head,
)
from meduet_models.meduet import FactorNetwork
from meduet_models.weights import save_weights, sha256_of_tensors
from server.checkpoints import Checkpoint, Checkpoints
from server.exchanges.queries import ask_sites
from server.run_folder import write_whole
from strategies.aggregation import Bounds, ReplyRefused, StreamingSum
from strategies.quorum import Roster

FINETUNED = "finetuned.safetensors"
OnRound = Callable[[int, Mapping[str, Any]], None]
"""Called after each round with its number and report."""


@dataclass(frozen=True)
class FinetunedRun:
    """A complete federated fine-tuning."""

    network: SegmentationNetwork | ClassificationNetwork
    """After the last round, on the CPU."""
    rounds: tuple[dict[str, Any], ...]
    """One report per round: sites with examples, loss and seconds; refused with reasons."""
    path: Path
    """The file of the weights."""


def pretrained_sha256(network: FactorNetwork) -> str:
    """Hash that a `FinetunePlan` names the encoder of `network` by."""
    start = with_head(network, "classification", 2, trainable=True)
    return sha256_of_tensors(encoder_tensors(start.state_dict()))


def run_finetuning(
    grid: Grid,
    plan: RunPlan,
    finetuning: FinetunePlan,
    pretrained: FactorNetwork,
    folder: Path,
    *,
    on_round: OnRound = lambda round, report: None,
) -> FinetunedRun:
    """Fine-tune `pretrained` in `folder`, or go on with what is there.

    Raises `ValueError` when `pretrained` is not the encoder that `finetuning` names, `OtherPlan` when the
    folder holds another fine-tuning, and `RoundFailed` below the quorum (the last checkpoint stays).
    """
    local = finetuning.local
    if finetuning.run_sha256 != plan.sha256:
        raise ValueError(f"Expected a fine-tuning of run {plan.sha256[:12]}; it names another.")
    if (found := pretrained_sha256(pretrained)) != finetuning.pretrained_sha256:
        raise ValueError(
            f"Expected the pretrained encoder {finetuning.pretrained_sha256[:12]}; got {found[:12]}."
        )
    trainable = local.encoder == "finetuned"
    network = with_head(pretrained, local.task, local.classes, trainable=trainable, seed=finetuning.seed)
    start = network.state_dict()
    names = trained_keys(network)
    fixed = {name: tensor for name, tensor in start.items() if name not in names}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", finetuning.sha256)
    journal = Journal(folder / "journal.jsonl")
    book = ReplyBook(journal)
    last = checkpoints.latest() or Checkpoint(
        plan_sha256=finetuning.sha256,
        round=0,
        shared={name: start[name].clone() for name in names},
        optimiser={},
        bank={},
        metrics={"rounds": []},
    )
    if last.round == 0:
        checkpoints.save(last)
    write_whole(folder / "finetuning.json", finetuning.to_json())
    roster = Roster(plan.participants)
    for round in range(last.round + 1, finetuning.rounds + 1):
        trained, report = _round(grid, roster, book, plan, finetuning, round, last.shared, fixed)
        metrics = {"rounds": [*last.metrics["rounds"], report]}
        last = Checkpoint(
            plan_sha256=finetuning.sha256,
            round=round,
            shared=trained,
            optimiser={},
            bank={},
            metrics=metrics,
        )
        checkpoints.save(last)
        journal.append({"kind": "finetuning", "plan": finetuning.sha256, **report})
        on_round(round, report)
    network.load_state_dict({**fixed, **last.shared})
    path = folder / FINETUNED
    tensors = network.state_dict()
    provenance = {
        "finetuning": finetuning.to_json(),
        "plan": plan.to_json(),
        "tensors_sha256": sha256_of_tensors(tensors),
    }
    save_weights(path, tensors, provenance)
    return FinetunedRun(network.eval(), tuple(last.metrics["rounds"]), path)


def _round(
    grid: Grid,
    roster: Roster,
    book: ReplyBook,
    plan: RunPlan,
    finetuning: FinetunePlan,
    round: int,
    trained: Tensors,
    fixed: Tensors,
) -> tuple[Tensors, dict[str, Any]]:
    """The weights after a round, and its report."""
    bounds = Bounds(
        num_replies=len(roster.sites), max_norm=finetuning.update_clip_norm, max_examples=MOST_SCANS
    )
    total = StreamingSum(trained, bounds, threads=torch.get_num_threads())

    def fold(reply: FinetuneReply) -> None:
        if reply.finetuning_sha256 != finetuning.sha256 or reply.round != round:
            raise ReplyRefused(f"Expected a reply to round {round} of this fine-tuning; got another.")
        total.fold(reply.site, reply.update, reply.examples)
        reply.update.clear()  # folded: memory holds one update, not one of each site

    ask = FinetuneAsk(
        plan_json=plan.to_json(),
        finetuning_json=finetuning.to_json(),
        round=round,
        trained=trained,
        fixed=fixed,
    )
    replies, refused = ask_sites(grid, roster, plan, FINETUNING, ask, fold, book)
    mean = total.mean()
    sites = {site: {"examples": reply.examples, **reply.metrics} for site, reply in replies.items()}
    report = {"round": round, "sites": sites, "refused": refused}
    return {name: before + mean[name] for name, before in trained.items()}, report
