"""The process engine: all sites in this process, one after another, in the order of their number.

`side_by_side.py` is the same engine over several processes.

A Flower `Grid` without SuperLink or Ray: questions are kept until their reply is asked for, and only then the
client app is called, so one site works at a time and one reply is in memory. Deterministic. With
`through_wire`, every message goes to bytes and back (protobuf), as between machines.
What this file does not do: it catches nothing. What gets past a site's wall, or an interrupt, stops the run
as it would stop the process.

Uses one private class of Flower's (`TaskIdentity`), from which messages read their sender; pinned with
Flower.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from meduet_models.threads import fixed_threads
from strategies.quorum import numbered

_SUPERLINK = 1
_FIRST_NODE = 1000
_RUN = 1

OnTurn = Callable[[int, str, bool], None]
"""Called with a site's number and the type of a message: True when its work begins, False when it is done."""


def no_turn(site: int, message_type: str, begins: bool) -> None:
    """Nobody is told."""


def take_part() -> None:
    """Let messages that are made in this process be those of this engine's run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, _SUPERLINK, _RUN


def site_context(site: int, num_sites: int) -> Context:
    """A site's `Context`: site i has "partition-id" i in its node configuration."""
    return Context(
        run_id=_RUN,
        node_id=_FIRST_NODE + site,
        node_config={"partition-id": site, "num-partitions": num_sites},
        state=RecordDict(),
        run_config={},
    )


def message_bytes(message: Message) -> bytes:
    """A message as it goes over the wire."""
    content: bytes = message_to_proto(message).SerializeToString()
    return content


def message_of(content: bytes) -> Message:
    """Back from `message_bytes`."""
    message: Message = message_from_proto(WireMessage.FromString(content))
    return message


class FixedThreads(ClientApp):
    """`inner` with a fixed number of torch threads, on which sums of floats depend: engines must agree."""

    def __init__(self, inner: ClientApp, threads: int) -> None:
        super().__init__()
        self._inner, self._threads = inner, threads

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, then give the threads back."""
        with fixed_threads(self._threads):
            return self._inner(message, context)


class InProcessGrid(Grid):
    """`num_sites` sites that run `client_app` here; site i has "partition-id" i in its node configuration.

    A site's `Context` lives as long as this grid, as a SuperNode's does.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_sites: int,
        *,
        through_wire: bool = False,
        on_turn: OnTurn = no_turn,
    ) -> None:
        self._client_app, self._through_wire, self._on_turn = client_app, through_wire, on_turn
        self._contexts: Mapping[int, Context] = {
            _FIRST_NODE + site: site_context(site, num_sites) for site in range(num_sites)
        }
        self._waiting: dict[str, Message] = {}
        self._sent = 0
        take_part()

    def get_node_ids(self) -> Iterable[int]:
        """All sites, ascending."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All sites, each registered under its number."""
        return [numbered(node, number) for number, node in enumerate(self._contexts)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the questions; their ids."""
        identities = []
        for message in messages:
            self._sent += 1
            identity = str(self._sent)
            message.metadata.__dict__["_message_id"] = identity  # as Flower's own grids do
            self._ask(identity, message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies of the asked sites, waited for one after another."""
        replies = []
        for identity in message_ids:
            if (reply := self._reply(identity)) is not None:
                self._sent += 1
                reply.metadata.__dict__["_message_id"] = str(self._sent)
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """All replies; a site that runs here cannot be late."""
        return self.pull_messages(list(self.push_messages(messages)))

    def site_of(self, message: Message) -> int:
        """The number of the site that a question is for."""
        return message.metadata.dst_node_id - _FIRST_NODE

    def _ask(self, identity: str, message: Message) -> None:
        self._waiting[identity] = message

    def _reply(self, identity: str) -> Message | None:
        """The reply to a question that was pushed; None when it was handed over before."""
        if identity not in self._waiting:
            return None
        message = self._waiting.pop(identity)
        context = self._contexts[message.metadata.dst_node_id]
        with self._turn(self.site_of(message), message.metadata.message_type):
            return self._carried(self._client_app(self._carried(message), context))

    @contextmanager
    def _turn(self, site: int, message_type: str) -> Iterator[None]:
        self._on_turn(site, message_type, True)
        try:
            yield
        finally:
            self._on_turn(site, message_type, False)

    def _carried(self, message: Message) -> Message:
        return message_of(message_bytes(message)) if self._through_wire else message

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

    def set_run(self, run: Run) -> NoReturn:
        """There is no SuperLink, so no run of its."""
        raise NotImplementedError("Expected no SuperLink behind the process engine.")

    @property
    def run(self) -> Run:
        """There is no SuperLink, so no run of its."""
        raise NotImplementedError("Expected no SuperLink behind the process engine.")
