"""The wall around one reply: it is read, checked and used, or put aside with its reason.

Whatever is raised on the way, also by what we did not think of, is about this reply and ends nobody's run. A
reason is in our own words: what a site wrote is never repeated but for short names, with control characters
escaped. `use` is all or nothing, so that after a reply that was put aside everything is as before.
What this file does not do: it pulls nothing (`strategies/reply_pull.py`) and counts no quorum. A journal that
cannot be written is the centre's own trouble and passes.
"""

import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from flwr.app import Message, RecordDict

from federation.reply_book import ReplyBook
from federation.terminal import visible
from federation.wire.messages import MessageError, Refusal, RefusalKind, kind_of
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster, refusal
from strategies.streaming_grid import StreamingGrid

_LONGEST_REASON = 400

_log = logging.getLogger(__name__)


@runtime_checkable
class SiteReply(Protocol):
    """What every reply says of itself."""

    @property
    def site(self) -> str:
        """Who replies."""

    @property
    def plan_sha256(self) -> str:
        """Under which plan."""


Reply = TypeVar("Reply", bound=SiteReply)


class ReplyWall(Generic[Reply]):
    """The wall of one question that was put to several sites.

    `what` names the question in the log. `read` makes a reply of records and `use` checks and uses it; both
    raise what they like. A reply that was used is entered in `book` as an answer to a question of `kind`; one
    that came sealed, as what `use` opened and gives back: the line names what the site's gate let out.
    """

    def __init__(
        self,
        what: str,
        kind: str,
        plan_sha256: str,
        roster: Roster,
        book: ReplyBook,
        read: Callable[[RecordDict], Reply],
        use: Callable[[Reply], SiteReply | None],
        on_refusal: Callable[[int, RefusalKind], None] = lambda node, kind: None,
    ) -> None:
        self.answered: set[str] = set()
        """Sites whose reply was used."""
        self.refused: dict[str, str] = {}
        """Who was put aside, and why."""
        self._what, self._kind, self._plan_sha256 = what, kind, plan_sha256
        self._roster, self._book = roster, book
        self._read, self._use, self._on_refusal = read, use, on_refusal

    def take(self, node: int, message: Message) -> Reply | None:
        """The reply of a node, which was used; None when it was put aside."""
        try:
            reply = self._reply(node, message)
            draft = self._book.draft(self._kind, reply)
            if (opened := self._use(reply)) is not None:
                draft = self._book.draft(self._kind, opened)
        except (MessageError, ReplyRefused) as error:
            self.put_aside(node, str(error))
            return None
        except Exception as error:  # noqa: BLE001, the wall: see above
            self.put_aside(node, f"Expected a reply that can be read; {type(error).__name__} was raised.")
            return None
        self._book.enter(draft)
        self.answered.add(reply.site)
        return reply

    def put_aside(self, node: int, why: str) -> None:
        """Note that the reply of a node is not used."""
        self.refuse(self._roster.name(node), why)

    def put_absent_aside(self, stream: StreamingGrid, deadline_s: float) -> None:
        """Note whose reply was too large to be pulled, and whose did not come in time, once `stream` has
        ended."""
        for node, why in stream.not_pulled.items():
            self.put_aside(node, why)
        for node in stream.unanswered:
            self.put_aside(node, f"no reply within {deadline_s:g} s")

    def refuse(self, who: str, why: str) -> None:
        """Note that a site's reply is not used, or no more."""
        self.answered.discard(who)
        self.refused[who] = _plain(why)
        _log.warning("%s goes on without %s: %s", self._what, who, self.refused[who])

    def _reply(self, node: int, message: Message) -> Reply:
        if message.has_error():
            raise ReplyRefused(f"Flower error {message.error.code}")  # its words may be the site's: not kept
        if kind_of(message.content) == "refusal":
            said = Refusal.from_record(message.content)
            self._on_refusal(node, said.kind)
            raise ReplyRefused(refusal(said.kind))
        reply = self._read(message.content)
        if problem := self._roster.objection(node, reply.site):
            raise ReplyRefused(problem)
        if reply.plan_sha256 != self._plan_sha256:
            raise ReplyRefused(f"Expected a reply under plan {self._plan_sha256[:12]}; it names another.")
        if reply.site in self.answered:
            raise ReplyRefused(f"Expected one reply of {reply.site!r}; got a second.")
        return reply


def _plain(why: str) -> str:
    """One line that shows what it is."""
    shown = visible(why)
    return shown if len(shown) <= _LONGEST_REASON else shown[:_LONGEST_REASON] + "…"
