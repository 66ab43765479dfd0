"""Queries: one question to every site outside of the rounds (survey, erasure), and its valid replies.

Bounded and strict like a round: nodes and replies are awaited until the deadline, each reply is pulled, read
and checked alone behind the same wall (`strategies/reply_wall.py`), a bad one is put aside with its reason,
and below the quorum the run stops.
What this file does not do: it knows nothing of what is asked.
"""

from collections.abc import Callable, Collection

from flwr.app import Message
from flwr.serverapp import Grid

from federation.exchanges.exchange import AskKind, Exchange, ReplyKind
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import RefusalKind
from strategies.quorum import Roster, check_quorum, needed, wait_for_nodes
from strategies.reply_wall import ReplyWall, SiteReply
from strategies.streaming_grid import Late, StreamingGrid


def ask_sites(
    grid: Grid,
    roster: Roster,
    plan: RunPlan,
    exchange: Exchange[AskKind, ReplyKind],
    question: AskKind,
    check: Callable[[ReplyKind], SiteReply | None],
    book: ReplyBook,
    *,
    stops: bool = True,
    at_least: int = 1,
    needs: int | None = None,
    only: Collection[str] | None = None,
    excused: Collection[RefusalKind] = (),
) -> tuple[dict[str, ReplyKind], dict[str, str]]:
    """Valid replies by site, in the plan's order, and who was put aside why.

    `check` raises on a reply that is not to be used, and gives back what a sealed one holds; the others are
    entered in `book`. Raises `RoundFailed` below the quorum, or with fewer than `at_least`; with `needs`,
    below that many instead. Without `stops`, the run goes on with whoever answered. A site that refuses for a
    reason in `excused` has said all it has to say, and counts as one that answered. With `only`, other sites
    that are known are not asked.
    """
    settings, record = plan.aggregation, question.to_record()
    quorum = max(settings.quorum, at_least / len(roster.sites))
    if needs is not None:
        quorum = needs / len(roster.sites)
    least = needed(quorum, len(roster.sites)) if stops else 1
    nodes = wait_for_nodes(grid, roster, least, settings.deadline_s)
    nodes = _of(nodes, roster, only)
    stream = StreamingGrid(grid)
    route = exchange.route
    declined: set[int] = set()

    def on_refusal(node: int, kind: RefusalKind) -> None:
        if kind in excused:
            declined.add(node)

    wall = ReplyWall(route, route, plan.sha256, roster, book, exchange.reply.from_record, check, on_refusal)
    replies: dict[str, ReplyKind] = {}

    def ask(node: int) -> Message:
        return Message(record, node, route, ttl=settings.deadline_s)

    for message in stream.send_and_receive(
        [ask(node) for node in nodes],
        timeout=settings.deadline_s,
        late=Late(
            ask,
            lambda: _to_ask(grid, roster, only),
            lambda: not stops or len(replies) + len(declined) >= least,
        ),
        largest=exchange.largest(plan, question),
    ):
        if (reply := wall.take(stream.node_of(message), message)) is not None:
            replies[reply.site] = reply
    wall.put_absent_aside(stream, settings.deadline_s)
    if stops:
        check_quorum(f"{route!r}", len(replies) + len(declined), quorum, len(roster.sites), wall.refused)
    return {site: replies[site] for site in roster.sites if site in replies}, wall.refused


def _to_ask(grid: Grid, roster: Roster, only: Collection[str] | None) -> list[int]:
    return _of(roster.asked(grid.get_nodes()), roster, only)


def _of(nodes: list[int], roster: Roster, only: Collection[str] | None) -> list[int]:
    """The nodes without sites that are known and not among `only`."""
    others = set(roster.sites) - set(only) if only is not None else set()
    return [node for node in nodes if roster.name(node) not in others]
