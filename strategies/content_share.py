"""Content sharing: the content branch is averaged, the style branch stays home.

A Flower `Strategy` with its own resumable loop of rounds. What is averaged is what it was given: the shared
tensors that the model declares (`meduet_models/sharing.py`); it looks at no name. What sites are asked to do
with them is a `Task`: to pretrain, to train the diffusion model, or to fine-tune with their labels. With the
same messages and more, or no, shared tensors it is FedAvg, FedProx (whose other half is at the sites), all
data pooled, or each site alone. Each reply is pulled, read, validated and folded alone behind a wall
(`strategies/reply_wall.py`), and dropped; a bad one is put aside with its reason, and the round goes on as
long as the quorum holds.
What this file does not do: it makes no checkpoint and no survey (`server/app.py`).

Source: Flower's Strategy interface; partial sharing as in FedBN (arXiv:2102.07623).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from federation.exchanges.pretraining import TrainReply
from federation.plan.plan import RunPlan, WireDtype
from federation.reply_book import ReplyBook
from federation.wire.limits import MOST_SCANS, largest_reply
from federation.wire.messages import RefusalKind
from federation.wire.wire import array_record, arrays_bytes
from strategies.aggregation import Bounds, ReplyRefused, StreamingSum
from strategies.quorum import Roster, RoundFailed, check_quorum, needed, wait_for_nodes
from strategies.reply_wall import ReplyWall
from strategies.robust import SpilledReplies
from strategies.server_optimisers import ServerOptimiser
from strategies.streaming_grid import Late, StreamingGrid

_log = logging.getLogger(__name__)

Fold = StreamingSum | SpilledReplies
SiteReport = dict[str, Any]
OnReply = Callable[[int, str, SiteReport], None]


@dataclass
class RoundReport:
    """A round in numbers: who answered with what, who was put aside and why."""

    round: int
    seconds: float = 0.0
    sites: dict[str, SiteReport] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What sites do with the shared weights in a round."""

    message_type: str
    """Flower's route of the question; the answer is a `TrainReply`."""
    sha256: str
    """Hash of what the sites agreed to, under which they answer: the plan, or the fine-tuning."""
    rounds: int
    """Rounds."""
    max_norm: float
    """L2 norm of a site's mean update, at most."""
    question: Callable[[int, bool], RecordDict]
    """The question of a round, with the start for a site that missed it or without; the strategy puts the
    record "shared" into it."""
    wire_dtype: WireDtype
    """How the shared weights travel to the sites."""


class ContentShare(Strategy):
    """The strategy of one task. `shared` names and shapes what is averaged, by its tensors; valid replies are
    entered in `book`."""

    def __init__(
        self,
        plan: RunPlan,
        shared: Mapping[str, Tensor],
        task: Task,
        *,
        roster: Roster,
        folder: Path,
        book: ReplyBook,
        on_reply: OnReply = lambda round_number, site, report: None,
    ) -> None:
        self.plan, self.task, self.roster = plan, task, roster
        self.shared = {name: tensor.detach().clone() for name, tensor in shared.items()}
        settings = plan.aggregation
        if 0 < settings.norm_tolerance <= 1 or settings.norm_tolerance < 0:
            raise ValueError(
                f"Expected aggregation.norm_tolerance to be 0 or above 1; got {settings.norm_tolerance:g}."
            )
        self.optimiser = ServerOptimiser(settings.optimiser, settings.learning_rate, settings.momentum)
        self.report = RoundReport(0)
        self._folder, self._book, self._on_reply = folder, book, on_reply
        self._bytes_down = 0
        self._behind: set[int] = set()
        self._stream: StreamingGrid | None = None
        self._bounds = Bounds(num_replies=len(roster.sites), max_norm=task.max_norm, max_examples=MOST_SCANS)
        self._largest = largest_reply(self.shared, task.wire_dtype)
        self._sum: StreamingSum | None = None
        if settings.rule == "mean":
            spill = folder / "replies" if settings.norm_tolerance else None
            self._sum = StreamingSum(self.shared, self._bounds, torch.get_num_threads(), spill)

    def rounds(self, grid: Grid, done: int = 0) -> Iterator[RoundReport]:
        """Run the rounds after `done`; after each, `shared` and `optimiser` are those of the next round.

        The caller may stop between two rounds and go on later from the same shared weights and optimiser
        state: the rest is the same to the last bit. Raises `RoundFailed` below the quorum; then nothing has
        changed since the last round.
        """
        stream = StreamingGrid(grid)
        for round_number in range(done + 1, self.task.rounds + 1):
            messages = self.configure_train(round_number, self._arrays(), ConfigRecord(), stream)
            replies = stream.send_and_receive(
                messages,
                timeout=self.plan.aggregation.deadline_s,
                late=self._late(round_number, grid),
                largest=self._largest,
            )
            del messages  # the grid holds what it still has to send
            self._stream = stream
            self._aggregate(round_number, replies)
            yield self.report

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's question to every site that can be asked; waits for them until the deadline."""
        settings = self.plan.aggregation
        self.report = RoundReport(server_round, seconds=-time.monotonic())
        least = needed(settings.quorum, len(self.roster.sites))
        nodes = wait_for_nodes(grid, self.roster, least, settings.deadline_s)
        behind = self._behind.intersection(nodes)
        records = {start: self._record(server_round, arrays, start) for start in {n in behind for n in nodes}}
        self._bytes_down = min(arrays_bytes(record) for record in records.values())
        return [self._message(server_round, node, records[node in behind]) for node in nodes]

    def _arrays(self) -> ArrayRecord:
        return array_record(self.shared, self.task.wire_dtype)

    def _record(self, round_number: int, arrays: ArrayRecord, start: bool) -> RecordDict:
        record = self.task.question(round_number, start)
        record["shared"] = arrays
        return record

    def _message(self, round_number: int, node: int, record: RecordDict) -> Message:
        deadline_s = self.plan.aggregation.deadline_s
        return Message(record, node, self.task.message_type, ttl=deadline_s, group_id=str(round_number))

    def _late(self, round_number: int, grid: Grid) -> Late:
        def question(node: int) -> Message:
            record = self._record(round_number, self._arrays(), node in self._behind)
            return self._message(round_number, node, record)

        least = needed(self.plan.aggregation.quorum, len(self.roster.sites))
        return Late(
            question,
            nodes=lambda: self.roster.asked(grid.get_nodes()),
            enough=lambda: len(self.report.sites) >= least,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Fold the valid replies, take the server's step, and return the next shared arrays and mean losses.

        Raises `RoundFailed` when fewer than the quorum are valid.
        """
        self._aggregate(server_round, replies)
        return self._arrays(), MetricRecord(dict(self.report.loss))

    def _aggregate(self, server_round: int, replies: Iterable[Message]) -> None:
        fold = self._fold(server_round)
        wall = self._wall(server_round, fold)
        for message in replies:
            node = self._stream.node_of(message) if self._stream else message.metadata.src_node_id
            if (reply := wall.take(node, message)) is not None:
                bytes_up = arrays_bytes(message.content)
                report = site_report(reply, bytes_down=self._bytes_down, bytes_up=bytes_up)
                self.report.sites[reply.site] = report
                wall.refused.pop(reply.site, None)  # what it said before it had the start
                self._behind.discard(node)
                self._on_reply(server_round, reply.site, report)
            del message, reply
        if self._stream is not None:
            wall.put_absent_aside(self._stream, self.plan.aggregation.deadline_s)
        sites = self.roster.sites
        quorum = self.plan.aggregation.quorum
        for site, why in fold.screen(self.plan.aggregation.norm_tolerance).items():
            del self.report.sites[site]
            wall.refuse(site, why)
        self.report.sites = {s: self.report.sites[s] for s in sites if s in self.report.sites}
        check_quorum(f"round {server_round}", len(self.report.sites), quorum, len(sites), self.report.refused)
        try:
            mean = fold.mean()
        except ReplyRefused as error:  # a robust rule needs more than the quorum
            raise RoundFailed(str(error), self.report.refused) from error
        self.shared = self.optimiser.step(self.shared, mean)
        self.report.seconds += time.monotonic()
        self.report.loss = mean_losses(self.report.sites)

    def _fold(self, round_number: int) -> Fold:
        settings = self.plan.aggregation
        match settings.rule:
            case "mean":
                assert self._sum is not None
                self._sum.reset()
                return self._sum
            case "trimmed_mean" | "median" | "krum":
                folder = self._folder / f"replies-{round_number:04d}"
                return SpilledReplies(self.shared, self._bounds, folder, settings.rule, settings.trim)

    def _wall(self, round_number: int, fold: Fold) -> ReplyWall[TrainReply]:
        """The wall around each reply to this round's question."""

        def use(reply: TrainReply) -> None:
            if reply.round != round_number:
                raise ReplyRefused(
                    f"Expected a reply to round {round_number}; got one to round {reply.round}."
                )
            if reply.wire_dtype != (asked := self.task.wire_dtype):
                raise ReplyRefused(f"Expected values as {asked}; got {reply.wire_dtype}.")
            fold.fold(reply.site, reply.update, reply.examples)

        def on_refusal(node: int, kind: RefusalKind) -> None:
            if kind is RefusalKind.OUT_OF_ORDER:
                self._ask_with_start(round_number, node)

        wall = ReplyWall(
            f"round {round_number}",
            self.task.message_type,
            self.task.sha256,
            self.roster,
            self._book,
            lambda record: TrainReply.from_record(record, copy=False),
            use,
            on_refusal,
        )
        self.report.refused = wall.refused
        return wall

    def _ask_with_start(self, round_number: int, node: int) -> None:
        """Ask a site that missed or lost the start once more in this round, with the start; a site that had
        it and refuses all the same is put aside."""
        if round_number == 1 or node in self._behind or self._stream is None:
            return
        self._behind.add(node)
        self._stream.ask(self._message(round_number, node, self._record(round_number, self._arrays(), True)))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody: sites measure while they train, and the model is not sent twice."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nobody was asked."""
        return None

    def summary(self) -> None:
        """Say in the log what is averaged."""
        values = sum(tensor.numel() for tensor in self.shared.values())
        _log.info(
            "%s of %d sites: %d tensors, %d values shared; %s.",
            self.plan.aggregation.method,
            len(self.roster.sites),
            len(self.shared),
            values,
            self.plan.aggregation.rule,
        )


def site_report(reply: TrainReply, *, bytes_down: int, bytes_up: int) -> SiteReport:
    """What is kept of a reply: its numbers, losses apart."""
    losses, others = losses_apart(reply.metrics)
    sizes = {"examples": reply.examples, "bytes_down": bytes_down, "bytes_up": bytes_up}
    return {**sizes, **others, "loss": losses}


def losses_apart(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The terms of the loss by name, and the other metrics."""
    losses = {n.removeprefix("loss."): v for n, v in metrics.items() if n.startswith("loss.")}
    return losses, {name: value for name, value in metrics.items() if not name.startswith("loss.")}


def mean_losses(sites: Mapping[str, SiteReport]) -> dict[str, float]:
    """Mean of each loss term over the sites that told it, weighted by examples."""
    terms = sorted({term for report in sites.values() for term in report["loss"]})
    means = {}
    for term in terms:
        values = [(r["examples"], r["loss"][term]) for r in sites.values() if term in r["loss"]]
        means[term] = sum(n * value for n, value in values) / sum(n for n, _ in values)
    return means
