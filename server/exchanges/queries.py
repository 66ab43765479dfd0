"""Queries: one question to every site outside of the rounds (survey, erasure), and its valid replies.

Bounded and strict like a round: nodes and replies are awaited until the deadline, each reply is read and
checked alone, a bad one is put aside with its reason, and below the quorum the run stops.
What this file does not do: it knows nothing of what is asked.
"""

import logging
from collections.abc import Callable, Collection

from flwr.app import Message
from flwr.serverapp import Grid

from federation.exchanges.exchange import AskKind, Exchange, ReplyKind
from federation.messages import MessageError, Refusal, kind_of
from federation.plan import RunPlan
from federation.reply_book import ReplyBook
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster, check_quorum, needed, wait_for_nodes
from strategies.streaming_grid import Late, StreamingGrid

_log = logging.getLogger(__name__)


def ask_sites(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    exchange: Exchange[AskKind, ReplyKind],
    question: AskKind,
    check: Callable[[ReplyKind], None],
    book: ReplyBook,
    stops: bool = True,
    only: Collection[str] | None = None,
) -> tuple[dict[str, ReplyKind], dict[str, str]]:
    """Valid replies by site, in the plan's order, and who was put aside why.

    `check` raises `ValueError` on a reply that is not to be used; the others are entered in `book`.
    Raises `RoundFailed` below the quorum; without `stops`, the run goes on with whoever answered. With
    `only`, other sites that are known are not asked.
    """
    settings, record = plan.aggregation, question.to_record()
    least = needed(settings.quorum, len(roster.sites)) if stops else 1
    nodes = wait_for_nodes(grid, roster, least, settings.deadline_s)
    nodes = _of(nodes, roster, only)
    stream = StreamingGrid(grid)
    replies: dict[str, ReplyKind] = {}
    refused: dict[str, str] = {}

    def ask(node: int) -> Message:
        return Message(record, node, exchange.route, ttl=settings.deadline_s)

    for message in stream.send_and_receive(
        [ask(node) for node in nodes],
        timeout=settings.deadline_s,
        late=Late(ask, lambda: _to_ask(grid, roster, only), lambda: not stops or len(replies) >= least),
    ):
        node = stream.node_of(message)
        try:
            reply = _read(message, node, roster, plan, exchange)
            if reply.site in replies:
                raise ReplyRefused(f"Expected one reply of {reply.site!r}; got a second.")
            draft = book.draft(exchange.route, reply)
            check(reply)
            book.enter(draft)
            replies[reply.site] = reply
        except ValueError as error:
            refused[roster.name(node)] = str(error)
    refused |= {roster.name(n): f"no reply within {settings.deadline_s:g} s" for n in stream.unanswered}
    for who, why in refused.items():
        _log.warning("%s goes on without %s: %s", exchange.route, who, why)
    if stops:
        check_quorum(f"{exchange.route!r}", len(replies), settings.quorum, len(roster.sites), refused)
    return {site: replies[site] for site in roster.sites if site in replies}, refused


def _to_ask(grid: Grid, roster: Roster, only: Collection[str] | None) -> list[int]:
    return _of(roster.asked(list(grid.get_node_ids())), roster, only)


def _of(nodes: list[int], roster: Roster, only: Collection[str] | None) -> list[int]:
    """The nodes without sites that are known and not among `only`."""
    others = set(roster.sites) - set(only) if only is not None else set()
    return [node for node in nodes if roster.name(node) not in others]


def _read(
    message: Message, node: int, roster: Roster, plan: RunPlan, exchange: Exchange[AskKind, ReplyKind]
) -> ReplyKind:
    if message.has_error():
        raise ReplyRefused(f"Flower error {message.error.code}")  # its words may be the site's: not kept
    if kind_of(message.content) == "refusal":
        refusal = Refusal.from_record(message.content)
        roster.bind(node, refusal.site)
        raise ReplyRefused(f"refused: {refusal.kind.value}")
    reply = exchange.reply.from_record(message.content)
    if problem := roster.bind(node, reply.site):
        raise ReplyRefused(problem)
    if reply.plan_sha256 != plan.sha256:
        raise MessageError(f"Expected a reply under plan {plan.sha256[:12]}; it names another.")
    return reply
