"""A grid that hands over replies one at a time: one reply in memory, however many sites.

Flower's grids return all replies of a round in a list. This one wraps a grid, asks for one message id at a
time, and remembers which node each question went to. Replies are told apart by the question that was asked
for, never by what they say: an error reply made by Flower itself carries the SuperLink's node id, and a site
can write any other there.

From SuperLink replies are pulled within the size of the largest one (`strategies/reply_pull.py`); a reply
that is not pulled is in `not_pulled`, with the reason.

Such an error means that a site's process or its SuperNode died, or that the network was gone: nobody has
answered. While others are awaited anyway, or too few have answered, a lost site, or one that was not there
when the round began, is asked as soon as it is connected, a few times at most; it goes on from what it has on
disk. For such a site alone nobody waits. Whoever reads the replies may also put another question to a site
that has answered (`ask`), and its reply is awaited with the others.
What this file does not do: it judges no reply. `unanswered` says who was silent at the deadline.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from federation.wire.limits import Largest
from strategies.aggregation import ReplyRefused
from strategies.reply_pull import BoundedPull

ASKS = 4
"""How often a site is asked in a round, at most."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
_LOOK_S = 1.0  # between two looks at who is connected

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Late:
    """How nodes are asked after the others."""

    question: Callable[[int], Message]
    """The question, made anew for a node."""
    nodes: Callable[[], Iterable[int]]
    """Who may be asked now."""
    enough: Callable[[], bool]
    """Whether the replies so far will do."""


class StreamingGrid(Grid):
    """`inner`, with replies streamed."""

    def __init__(self, inner: Grid) -> None:
        self._inner = inner
        self._node_of: dict[str, int] = {}
        self.unanswered: dict[int, str] = {}
        """Nodes of the last question that have not answered, with the id of their question."""
        self._asked: dict[int, int] = {}
        self.not_pulled: dict[int, str] = {}
        """Nodes whose answer to the last question was left at SuperLink, and why."""
        self._pull: Callable[[str], Message | None] = self._pull_as_it_is

    def node_of(self, reply: Message) -> int:
        """The node whose question this reply answers."""
        return self._node_of.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        late: Late | None = None,
        largest: Largest | None = None,
    ) -> Iterable[Message]:
        """Send now; replies come from the iterator, as they arrive, until all are in or `timeout`.

        `late`: how nodes are asked that were lost, or were not there yet; without it nobody is. `largest`:
        what is pulled from SuperLink at most; without it whatever comes.
        """
        self._node_of, self.unanswered, self.not_pulled = {}, {}, {}
        self._pull = self._pull_as_it_is
        if largest is not None and isinstance(self._inner, HttpGrid):
            self._pull = BoundedPull(self._inner, largest)
        for message in messages:
            self._push(message)  # one by one: a shorter list would not say whose message was not taken
        end = None if timeout is None else time.monotonic() + timeout
        return self._replies(end, late)

    def ask(self, message: Message) -> bool:
        """Put a question to a node while the replies to the last ones are read; whether it was taken. A node
        is asked `ASKS` times at most."""
        node = message.metadata.dst_node_id
        if self._asked.get(node, 0) >= ASKS or not self._push(message):
            return False
        self._asked[node] = self._asked.get(node, 0) + 1
        return True

    def _push(self, message: Message) -> bool:
        taken = list(self._inner.push_messages([message]))
        if not taken or not taken[0]:
            return False
        self._node_of[taken[0]] = message.metadata.dst_node_id
        self.unanswered[message.metadata.dst_node_id] = taken[0]
        return True

    def _replies(self, end: float | None, late: Late | None) -> Iterator[Message]:
        pause_s, next_look = _SHORTEST_PAUSE_S, time.monotonic() + _LOOK_S
        asked = self._asked = dict.fromkeys(self.unanswered, 1)
        lost: dict[int, Message] = {}  # Flower's last error for each
        while self.unanswered or lost:
            answered = False
            for node, identity in list(self.unanswered.items()):
                try:
                    reply = self._pull(identity)
                except ReplyRefused as reason:
                    self.unanswered.pop(node, None)
                    self.not_pulled[node] = str(reason)
                    continue
                if reply is None:
                    continue
                self.unanswered.pop(node, None)
                answered = True
                reply.metadata.__dict__["_reply_to_message_id"] = identity  # whatever it says itself
                if late is not None and reply.has_error() and asked[node] < ASKS:
                    lost[node] = reply
                else:
                    yield reply
                del reply
            if end is not None and time.monotonic() >= end:
                break
            if late is not None:
                if lost and not self.unanswered and late.enough():
                    break
                if time.monotonic() >= next_look:
                    for node in late.nodes():
                        if (node in lost or node not in asked) and self.ask(late.question(node)):
                            lost.pop(node, None)
                            _log.warning("Node %d is asked, for time %d of %d.", node, asked[node], ASKS)
                    next_look = time.monotonic() + _LOOK_S
            if not answered:
                time.sleep(pause_s if end is None else min(pause_s, max(0.0, end - time.monotonic())))
            pause_s = _SHORTEST_PAUSE_S if answered else min(1.5 * pause_s, _LONGEST_PAUSE_S)
        yield from lost.values()

    def _pull_as_it_is(self, identity: str) -> Message | None:
        return next(iter(self._inner.pull_messages([identity])), None)

    def set_run(self, run: Run) -> None:
        """As `inner`."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """As `inner`."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message; Flower's own is deprecated in favour of the constructor, which is used here."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """As `inner`."""
        return self._inner.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """As `inner`."""
        return self._inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As `inner`."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As `inner`."""
        return self._inner.pull_messages(message_ids)
