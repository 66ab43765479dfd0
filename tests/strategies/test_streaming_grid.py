import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.engines.in_process import InProcessGrid
from strategies.streaming_grid import ASKS, Late, StreamingGrid


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


class Losing(InProcessGrid):
    """Node 1000 is lost `times` times, with the error that Flower makes; node 1001 connects late."""

    def __init__(self, app: ClientApp, times: int, connected: tuple[int, ...] = (1000, 1001)) -> None:
        super().__init__(app, 2)
        self.times, self.connected, self.pushed = times, connected, list[int]()

    def get_node_ids(self) -> Iterable[int]:
        return self.connected

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.pushed += [message.metadata.dst_node_id for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (identity,) = message_ids
        ask = self._waiting[identity]
        if ask.metadata.dst_node_id == 1000 and self.times:
            self.times -= 1
            del self._waiting[identity]
            return [Message(Error(code=5, reason="Node Unavailable"), reply_to=ask)]
        return super().pull_messages([identity])


def late(grid: Losing, enough: bool) -> Late:
    return Late(
        lambda node: Message(RecordDict(), node, "query.survey"),
        nodes=grid.get_node_ids,
        enough=lambda: enough,
    )


def test_a_lost_site_is_asked_again_while_too_few_have_answered(app: ClientApp) -> None:
    inner = Losing(app, times=2)
    stream = StreamingGrid(inner)
    replies = list(stream.send_and_receive(asks(inner), timeout=30.0, late=late(inner, enough=False)))
    assert [reply.has_error() for reply in replies] == [False, False]
    assert inner.pushed == [1000, 1001, 1000, 1000]


def test_a_lost_site_is_asked_a_few_times_and_no_more(app: ClientApp) -> None:
    inner = Losing(app, times=100)
    stream = StreamingGrid(inner)
    replies = list(stream.send_and_receive(asks(inner), timeout=60.0, late=late(inner, enough=False)))
    assert [reply.has_error() for reply in replies] == [False, True]
    assert inner.pushed.count(1000) == ASKS


def test_for_a_lost_site_alone_nobody_waits_when_the_others_are_enough(app: ClientApp) -> None:
    inner = Losing(app, times=100)
    stream = StreamingGrid(inner)
    start = time.monotonic()
    replies = list(stream.send_and_receive(asks(inner), timeout=60.0, late=late(inner, enough=True)))
    assert sorted(reply.has_error() for reply in replies) == [False, True]
    assert inner.pushed == [1000, 1001]
    assert time.monotonic() - start < 30.0


def test_a_lost_site_that_does_not_come_back_is_named_at_the_deadline_with_its_error(app: ClientApp) -> None:
    inner = Losing(app, times=1, connected=(1001,))
    stream = StreamingGrid(inner)
    first = Message(RecordDict(), 1000, "query.survey")
    replies = list(stream.send_and_receive([first], timeout=2.5, late=late(inner, enough=False)))
    assert [stream.node_of(reply) for reply in replies if reply.has_error()] == [1000]
    assert [stream.node_of(reply) for reply in replies if not reply.has_error()] == [1001]  # it came late
    assert inner.pushed == [1000, 1001]
