"""Rounds as secure sums: the centre learns the mean of a round's updates, and no site's own.

Four questions a round (`federation/exchanges/secure_sum.py`). Sites may be lost at each of them, as long as
the threshold is left; below it the attempt is given up, and another begins with fresh keys. Once a list of
survivors was sent there is no other attempt: where its sum cannot be opened, the round is burnt. It counts,
the weights stay as they were, and the next round begins from them.

Keys that a site announces are checked here, too, against the consortium's authority: a key that somebody put
in a site's place costs that site its place, not everybody the attempt.

What this file does not do: it sees no update, so it judges none: no norm screen, no robust rule, no losses of
single sites. A site is bounded by its own gate alone; what a lying one can do shows, if at all, in the sum.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.x509 import Certificate
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.exchanges.secure_sum import (
    SUM_KEYS,
    SUM_MASKED,
    SUM_PRIVATE,
    SUM_SHARES,
    SUM_UNMASK,
    SumKeysAsk,
    SumMaskedAsk,
    SumMaskedReply,
    SumPrivateAsk,
    SumSharesAsk,
    SumTextReply,
    SumUnmaskAsk,
    SumVectorAsk,
    announced_of,
    list_of,
    roster_text,
    said_of,
    shares_of,
    signed_announcement,
    summed_rounds,
)
from federation.exchanges.style_code import LATENTS
from federation.keys.certificates import utc_now
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Ask, RefusalKind, Tensors
from federation.wire.sum_layout import SumLayout, SumOfSites
from federation.wire.wire import array_record, arrays_bytes
from forms.json_text import canonical
from privacy.secure_sum.party import Opened
from privacy.secure_sum.transcript import Attempt, SumRefused, SurvivorList, threshold
from server.exchanges.queries import ask_sites
from server.sum_records import SumRecord, SumRecords
from strategies.aggregation import ReplyRefused
from strategies.content_share import OnReply, RoundReport, losses_apart
from strategies.quorum import Roster, RoundFailed, check_quorum, needed, wait_for_nodes
from strategies.reply_wall import ReplyWall
from strategies.ring_sum import RingSum
from strategies.server_optimisers import ServerOptimiser
from strategies.streaming_grid import Late, StreamingGrid

ATTEMPTS = 3
"""Attempts at a round before the run stops."""
BURNT_IN_A_ROW = 3
"""Rounds burnt one after the other, at which the run stops."""
_log = logging.getLogger(__name__)


@dataclass
class SumReport(RoundReport):
    """A round as a secure sum: `sites` says who is in it and how many bytes it took, and nothing more."""

    attempt: int = 0
    summed: dict[str, float] = field(default_factory=dict)
    """What the sum says beside the mean update: scans behind it, its length, means of metrics."""
    burnt: str = ""
    """Why the round is burnt; empty: it is not."""


class SumBurnt(RuntimeError):
    """The sum of the round's list cannot be opened, and no other list may be."""


class SecureSums:
    """The rounds of a plan with secure sums; `shared` and `optimiser` are those of the next round. With
    privacy they are noisy steps, and `public` the scans that they take; a round of which a vector may have
    left is burnt where it fails, not begun again."""

    def __init__(
        self,
        plan: RunPlan,
        shared: Mapping[str, Tensor],
        style_bank: Tensors,
        home: Tensors,
        *,
        roster: Roster,
        folder: Path,
        book: ReplyBook,
        authority: Certificate | None,
        on_reply: OnReply = lambda round_number, site, report: None,
        public: Tensor | None = None,
    ) -> None:
        """`authority`: who certified the sites' keys; None: nobody that the centre knows, and only the sites
        look at each other's signatures."""
        self.plan, self.roster, self._authority = plan, roster, authority
        self.shared = {name: tensor.detach().clone() for name, tensor in shared.items()}
        settings = plan.aggregation
        self.optimiser = ServerOptimiser(settings.optimiser, settings.learning_rate, settings.momentum)
        self.report = SumReport(0)
        self._bank, self._home, self._public = dict(style_bank), dict(home), public
        self._first = summed_rounds(plan)[0]
        self._book, self._on_reply = book, on_reply
        self._records = SumRecords(folder / "secure_sums")
        self._layout = SumLayout.of(plan, {name: tensor.shape for name, tensor in shared.items()})
        self._threshold = threshold(len(plan.sites))
        self._least = max(self._threshold, needed(settings.quorum, len(plan.sites)))
        self._behind: set[int] = set()

    def rounds(self, grid: Grid, done: int = 0) -> Iterator[SumReport]:
        """Run the rounds after `done`; as `ContentShare.rounds`. Raises `RoundFailed` when too few sites are
        left in every attempt at a round, or round after round is burnt; the last checkpoint stays."""
        burnt = 0
        for round_number in range(done + 1, self.plan.num_rounds + 1):
            self.report = SumReport(round_number, seconds=-time.monotonic())
            try:
                summed = self._sum(grid, round_number)
            except SumBurnt as why:
                self.report.burnt = str(why)
                _log.warning("Round %d is burnt, and the weights stay: %s", round_number, why)
                burnt += 1
                if burnt == BURNT_IN_A_ROW:
                    text = f"Expected a round whose sum can be opened; {burnt} in a row were burnt. {why}"
                    raise RoundFailed(text, self.report.refused) from why
            else:
                burnt = 0
                self._take(summed)
            self.report.seconds += time.monotonic()
            yield self.report

    def summary(self) -> None:
        """Say in the log what is summed."""
        _log.info(
            "Secure sums of %d values of %d sites; %d must answer; steps of 2^%d.",
            self._layout.num_values,
            len(self.roster.sites),
            self._least,
            -self._layout.bits,
        )

    def _sum(self, grid: Grid, round_number: int) -> SumOfSites:
        """What the sum of a round says. Raises `RoundFailed`, and `SumBurnt` once a list was sent."""
        for tried in range(1, ATTEMPTS + 1):
            try:
                total = self._masked(grid, round_number)
                break
            except RoundFailed as failed:
                record = self._records.read(round_number)
                noisy = self._public is not None and record.texts
                if record.survivors or noisy:
                    raise SumBurnt(str(failed)) from failed
                if not record.announced:  # too few are there at all
                    raise
                self._records.write(round_number, SumRecord(attempt=record.attempt + 1))
                if tried == ATTEMPTS:
                    raise
                _log.warning("Round %d begins again, with fresh keys: %s", round_number, failed)
        record = self._records.read(round_number)
        return self._opened(grid, round_number, record, total)

    def _masked(self, grid: Grid, round_number: int) -> RingSum:
        """The sum of the masked vectors of one attempt, from wherever it is; its list is on disk then."""
        record = self._records.read(round_number)
        self.report.attempt = record.attempt
        asked: dict[str, Any] = {
            "plan_json": self.plan.to_json(),
            "round": round_number,
            "attempt": record.attempt,
        }

        # 1. Fresh keys
        if not record.announced:
            said = self._ask(grid, SUM_KEYS, SumKeysAsk(**asked), self._check_announced)
            record = dataclasses.replace(record, announced=said)
            self._records.write(round_number, record)

        # 2. Each site's secrets, divided among all, in texts that only they can open
        if not record.texts:
            roster = roster_text(record.announced)
            question = SumSharesAsk(**asked, roster=roster)
            others = set(record.announced)
            said = self._ask(
                grid, SUM_SHARES, question, lambda reply: _check_texts(reply, others), only=record.announced
            )
            texts = {site: _hexed(shares_of(text)) for site, text in said.items()}
            record = dataclasses.replace(record, texts=texts)
            self._records.write(round_number, record)

        # 3. Masked vectors, added up as they come
        total = self._vectors(grid, round_number, record)
        if not record.survivors:
            self._records.write(
                round_number, dataclasses.replace(record, survivors=tuple(sorted(total.sites)))
            )
        return total

    def _check_announced(self, reply: SumTextReply) -> None:
        """Keys that a site did not sign would be refused by every other site, and the attempt would be lost:
        they are put aside here already, where the authority is known."""
        if self._authority is None:
            announced_of(reply.text)
            return
        attempt = Attempt(self.plan.sha256, reply.round, reply.attempt)
        signed_announcement(reply.text, reply.site, attempt, self.plan, self._authority, utc_now())

    def _opened(self, grid: Grid, round_number: int, record: SumRecord, total: RingSum) -> SumOfSites:
        # 4. Of each survivor the seed of its own mask, of each lost site the key of its masks with others
        survivors = frozenset(record.survivors)
        said = SurvivorList(survivors, frozenset(record.texts) - survivors)
        question = SumUnmaskAsk(
            plan_json=self.plan.to_json(),
            round=round_number,
            attempt=record.attempt,
            said=said_of(said.survivors, said.lost),
        )
        try:
            answers = self._ask(
                grid,
                SUM_UNMASK,
                question,
                lambda reply: Opened.from_text(reply.text, list_of(question.said)),
                only=survivors,
                needs=self._threshold,
            )
            opened = {site: Opened.from_text(text, said) for site, text in answers.items()}
            roster = {site: announced_of(text)[0] for site, text in record.announced.items()}
            attempt = Attempt(self.plan.sha256, round_number, record.attempt)
            return total.opened(attempt, roster, said, opened, self._threshold)
        except (RoundFailed, SumRefused) as why:
            raise SumBurnt(str(why)) from why

    def _take(self, summed: SumOfSites) -> None:
        self.shared = self.optimiser.step(self.shared, summed.mean)
        self.report.loss, others = losses_apart(summed.metrics)
        self.report.summed = {**others, "examples": summed.weight, "mean_norm": summed.norm}

    def _ask(
        self,
        grid: Grid,
        exchange: Exchange[Any, SumTextReply],
        question: Ask,
        check: Callable[[SumTextReply], object],
        only: Mapping[str, object] | frozenset[str] | None = None,
        needs: int | None = None,
    ) -> dict[str, str]:
        """The valid texts by site. Raises `RoundFailed` below what is needed."""
        try:
            replies, refused = ask_sites(
                grid,
                self.roster,
                self.plan,
                exchange,
                question,
                lambda reply: self._judge(reply, check),
                self._book,
                only=only,
                needs=needs or self._least,
            )
        except RoundFailed as failed:
            self.report.refused.update(failed.reasons)
            raise
        self.report.refused.update(refused)
        return {site: reply.text for site, reply in replies.items()}

    def _judge(self, reply: SumTextReply, check: Callable[[SumTextReply], object]) -> None:
        self._of_this_attempt(reply)
        try:
            check(reply)
        except SumRefused as error:
            raise ReplyRefused(str(error)) from error

    def _of_this_attempt(self, reply: SumTextReply | SumMaskedReply) -> None:
        now = (self.report.round, self.report.attempt)
        if (reply.round, reply.attempt) != now:
            raise ReplyRefused(
                f"Expected a reply to attempt {now[1]} of round {now[0]}; got one to attempt {reply.attempt} "
                f"of round {reply.round}."
            )

    def _vectors(self, grid: Grid, round_number: int, record: SumRecord) -> RingSum:
        """The masked vectors of those who shared, or of those on the list, if there is one already."""
        settings, total = self.plan.aggregation, RingSum(self._layout)
        members = set(record.survivors or record.texts)
        least = len(members) if record.survivors else self._least
        stream = StreamingGrid(grid)
        exchange: Exchange[Any, SumMaskedReply] = SUM_MASKED if self._public is None else SUM_PRIVATE
        arrays = array_record(self.shared, self.plan.release.wire_dtype)

        def question(node: int) -> Message:
            site = self.roster.name(node)
            texts = {peer: texts[site] for peer, texts in record.texts.items() if peer != site}
            start = round_number == self._first or node in self._behind
            asked = self._masked_question(round_number, record.attempt, texts, start, arrays)
            return Message(asked, node, exchange.route, ttl=settings.deadline_s, group_id=str(round_number))

        def connected() -> list[int]:
            return [n for n in self.roster.asked(grid.get_nodes()) if self.roster.name(n) in members]

        def use(reply: SumMaskedReply) -> None:
            self._of_this_attempt(reply)
            total.fold(reply.site, reply.masked)

        def on_refusal(node: int, kind: RefusalKind) -> None:
            if kind is RefusalKind.OUT_OF_ORDER and round_number > self._first and node not in self._behind:
                self._behind.add(node)  # asked the same again, with the common start
                stream.ask(question(node))

        wall = ReplyWall(
            f"round {round_number}",
            exchange.route,
            self.plan.sha256,
            self.roster,
            self._book,
            lambda came: SumMaskedReply.from_record(came, copy=False),
            use,
            on_refusal,
        )
        wait_for_nodes(grid, self.roster, least, settings.deadline_s)
        messages = [question(node) for node in connected()]
        bytes_down = min((arrays_bytes(message.content) for message in messages), default=0)
        replies = stream.send_and_receive(
            messages,
            timeout=settings.deadline_s,
            late=Late(question, connected, lambda: len(total.sites) >= least),
            largest=exchange.largest(self.plan, self._asked(round_number, record.attempt, {}, False)),
        )
        del messages
        for message in replies:
            node = stream.node_of(message)
            if (reply := wall.take(node, message)) is not None:
                report = {"bytes_down": bytes_down, "bytes_up": arrays_bytes(message.content), "loss": {}}
                self.report.sites[reply.site] = report
                wall.refused.pop(reply.site, None)  # what it said before it had the start
                self._behind.discard(node)
                self._on_reply(round_number, reply.site, report)
            del message, reply
        wall.put_absent_aside(stream, settings.deadline_s)
        self.report.refused.update(wall.refused)
        check_quorum(
            f"round {round_number}",
            len(total.sites),
            least / len(self.roster.sites),
            len(self.roster.sites),
            wall.refused,
        )
        return total

    def _asked(self, round_number: int, attempt: int, texts: dict[str, str], start: bool) -> SumVectorAsk:
        asked: dict[str, Any] = {
            "plan_json": self.plan.to_json(),
            "round": round_number,
            "shared": self.shared,
            "bank": self._bank,
            "home": self._home if start else None,
            "wire_dtype": self.plan.release.wire_dtype,
            "attempt": attempt,
            "texts": canonical(texts),
        }
        if self._public is None:
            return SumMaskedAsk(**asked)
        return SumPrivateAsk(**asked, public={LATENTS: self._public} if start else None)

    def _masked_question(
        self, round_number: int, attempt: int, texts: dict[str, str], start: bool, arrays: ArrayRecord
    ) -> RecordDict:
        asked = self._asked(round_number, attempt, texts, start)
        record = dataclasses.replace(asked, shared={}).to_record()
        record["shared"] = arrays  # made once a round: Flower sends equal arrays once
        return record


def _check_texts(reply: SumTextReply, roster: set[str]) -> None:
    if set(shares_of(reply.text)) != roster - {reply.site}:
        raise SumRefused("Expected a text for each other site on the roster; got others.")


def _hexed(texts: Mapping[str, bytes]) -> dict[str, str]:
    return {site: text.hex() for site, text in texts.items()}
