import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.in_process import InProcessGrid
from strategies.streaming_grid import StreamingGrid


class Silent(InProcessGrid):
    """Replies of some nodes never come; pulled ids are noted."""

    def __init__(self, app: ClientApp, num: int, silent: set[int]) -> None:
        super().__init__(app, num)
        self.silent, self.pulled = silent, list[list[str]]()
        self._to: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        identities = list(super().push_messages(messages))
        self._to |= {i: m.metadata.dst_node_id for i, m in zip(identities, messages, strict=True)}
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulled.append(list(message_ids))
        return super().pull_messages([i for i in self.pulled[-1] if self._to[i] not in self.silent])


@pytest.fixture
def answered() -> list[int]:
    return []


@pytest.fixture
def app(answered: list[int]) -> ClientApp:
    app = ClientApp()

    @app.query("survey")
    def survey(message: Message, context: object) -> Message:
        answered.append(message.metadata.dst_node_id)
        return Message(RecordDict(), reply_to=message)

    return app


def asks(grid: InProcessGrid) -> Iterator[Message]:
    for node in grid.get_node_ids():
        yield Message(RecordDict(), node, "query.survey")


def test_replies_come_one_at_a_time_and_are_told_apart_by_their_question(
    app: ClientApp, answered: list[int]
) -> None:
    inner = Silent(app, 3, silent=set())
    stream = StreamingGrid(inner)
    replies = iter(stream.send_and_receive(asks(inner), timeout=5.0))
    first = next(replies)
    assert answered == [1000]  # the second site has not been asked for its reply yet
    assert stream.node_of(first) == 1000
    assert [stream.node_of(reply) for reply in replies] == [1001, 1002]
    assert all(len(identities) == 1 for identities in inner.pulled)
    assert stream.unanswered == {}


def test_silent_nodes_are_awaited_until_the_deadline_and_named(app: ClientApp) -> None:
    inner = Silent(app, 3, silent={1001})
    stream = StreamingGrid(inner)
    start = time.monotonic()
    assert len(list(stream.send_and_receive(asks(inner), timeout=0.3))) == 2
    assert 0.3 <= time.monotonic() - start < 5.0
    assert list(stream.unanswered) == [1001]


def test_an_error_made_by_the_superlink_is_that_of_the_node_that_was_asked(app: ClientApp) -> None:
    inner = Silent(app, 2, silent=set())
    stream = StreamingGrid(inner)
    replies = list(stream.send_and_receive(asks(inner), timeout=5.0))
    ask = Message(RecordDict(), 1, "query.survey")  # so that src_node_id of the reply is 1, the SuperLink's
    ask.metadata.__dict__["_message_id"] = replies[1].metadata.reply_to_message_id
    error = Message(Error(code=3, reason="Node Unavailable"), reply_to=ask)
    assert error.metadata.src_node_id == 1
    assert stream.node_of(error) == 1001
