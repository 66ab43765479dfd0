"""What is pulled of replies as they lie at SuperLink; beside it, as the attack, what Flower pulls."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from federation.wire.limits import Largest, largest_reply
from federation.wire.wire import array_record, tensors_of
from simulations.engines.in_process import InProcessGrid
from strategies.aggregation import ReplyRefused
from strategies.reply_pull import BoundedPull
from strategies.streaming_grid import StreamingGrid

TENSORS = {"weight": torch.arange(6000.0).view(60, 100)}
LARGEST = largest_reply(TENSORS)


@dataclasses.dataclass
class Parcel:
    """A reply as a site puts it at SuperLink."""

    message: Any
    tree: ObjectTree
    contents: dict[str, bytes]


class SuperLink:
    """What Flower's grid talks to: messages and objects by their names, nothing checked."""

    def __init__(self, *parcels: Parcel) -> None:
        self.parcels = {f"question {number}": parcel for number, parcel in enumerate(parcels)}
        self.pulled: list[str] = []
        self.confirmed: list[str] = []
        self.sent: set[str] | None = None
        """Objects that have arrived; None: all."""

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        found = [self.parcels.pop(one) for one in request.message_ids if one in self.parcels]
        self.objects = {name: content for parcel in found for name, content in parcel.contents.items()}
        return PullAppMessagesResponse(
            messages_list=[parcel.message for parcel in found],
            message_object_trees=[parcel.tree for parcel in found],
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        self.pulled.append(request.object_id)
        if request.object_id not in self.objects:
            return PullObjectResponse(object_found=False)
        arrived = self.sent is None or request.object_id in self.sent
        content = self.objects[request.object_id] if arrived else b""
        return PullObjectResponse(object_found=True, object_available=arrived, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()


@pytest.fixture
def grid_to() -> Iterator[Callable[[SuperLink], HttpGrid]]:
    InProcessGrid(lambda message, context: message, 1)  # type: ignore[arg-type]  # messages need a sender

    def grid(link: SuperLink) -> HttpGrid:
        grid = HttpGrid(token="a token")
        grid._client = link  # type: ignore[assignment]
        grid.set_run(Run.create_empty(run_id=1))
        return grid

    return grid


def parcel(
    tensors: dict[str, torch.Tensor] | None = None,
    spoil: Callable[[dict[str, bytes]], None] = lambda contents: None,
) -> Parcel:
    """A reply with these tensors; `spoil` changes its objects' contents, whose names stay."""
    record = RecordDict({"head": ConfigRecord({"kind": "x"}), "told": array_record(tensors or TENSORS)})
    message = Message(record, 1, "query.x")
    tree = get_object_tree(message)
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    envelope = message_to_proto(remove_content_from_message(message))
    spoil(contents)
    return Parcel(envelope, tree, contents)


def an_array(contents: dict[str, bytes]) -> str:
    """Name of the largest array's object."""
    arrays = [name for name, content in contents.items() if content.startswith(b"Array ")]
    return max(arrays, key=lambda name: json.loads(contents[name].split(b"\0", 1)[1])["shape"][0])


def chunk_named_often(times: int) -> Callable[[dict[str, bytes]], None]:
    def spoil(contents: dict[str, bytes]) -> None:
        name = an_array(contents)
        head, body = contents[name].split(b"\0", 1)
        fields = json.loads(body) | {"arraychunk_ids": [0] * times}
        body = json.dumps(fields).encode()
        kind, children, _ = head.decode().split(" ")
        contents[name] = f"{kind} {children} {len(body)}".encode() + b"\0" + body

    return spoil


def without_chunk_ids(contents: dict[str, bytes]) -> None:
    name = an_array(contents)
    head, body = contents[name].split(b"\0", 1)
    fields = json.loads(body)
    del fields["arraychunk_ids"]
    contents[name] = head + b"\0" + json.dumps(fields).encode()


def a_record_for_a_message(contents: dict[str, bytes]) -> None:
    *_, message = contents  # the outermost comes last
    (record,) = [one for one in contents.values() if one.startswith(b"RecordDict ")]
    contents[message] = record


def test_a_reply_within_its_size_comes_as_it_was_sent(grid_to: Callable[..., HttpGrid]) -> None:
    link = SuperLink(parcel())
    message = BoundedPull(grid_to(link), LARGEST)("question 0")
    assert message is not None
    (array,) = message.content.array_records.values()
    assert torch.equal(tensors_of(array)["weight"], TENSORS["weight"])
    assert link.confirmed == [message.metadata.message_id]
    assert BoundedPull(grid_to(link), LARGEST)("question 0") is None


def peak(work: Callable[[], object]) -> int:
    """Bytes that were allocated at once, at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_array_that_names_one_chunk_many_times_is_not_built(grid_to: Callable[..., HttpGrid]) -> None:
    bomb = parcel(spoil=chunk_named_often(3000))
    assert sum(map(len, bomb.contents.values())) < 50_000
    attacked = grid_to(SuperLink(bomb))
    assert peak(lambda: attacked.pull_messages(["question 0"])) > 70e6  # what Flower makes of it

    pull = BoundedPull(grid_to(link := SuperLink(bomb)), LARGEST)

    def refused() -> None:
        with pytest.raises(ReplyRefused, match=r"at most 2\d+ bytes in arrays"):
            pull("question 0")

    assert peak(refused) < 2e6
    assert link.confirmed  # SuperLink may forget it


def test_more_bytes_than_the_plan_allows_are_not_pulled(grid_to: Callable[..., HttpGrid]) -> None:
    chunks = {str(number): torch.full((700_000,), float(number)) for number in range(8)}
    record = {name: array_record({name: tensor}) for name, tensor in chunks.items()}
    message = Message(RecordDict(record), 1, "query.x")
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    envelope = message_to_proto(remove_content_from_message(message))
    link = SuperLink(Parcel(envelope, get_object_tree(message), contents))
    pull = BoundedPull(grid_to(link), Largest(array_bytes=3_000_000))
    with pytest.raises(ReplyRefused, match="at most 3000000 bytes in arrays"):
        pull("question 0")
    assert sum(len(contents[name]) for name in set(link.pulled)) < 3_000_000 + 3 * 2_800_000


def test_more_objects_than_the_plan_allows_are_not_asked_for(grid_to: Callable[..., HttpGrid]) -> None:
    whole = parcel()
    whole.tree.children.extend(ObjectTree(object_id=f"{number:064x}") for number in range(100))
    link = SuperLink(whole)
    with pytest.raises(ReplyRefused, match="at most 64 objects"):
        BoundedPull(grid_to(link), LARGEST)("question 0")
    assert link.pulled == []


def test_scalars_without_end_are_not_pulled(grid_to: Callable[..., HttpGrid]) -> None:
    record = RecordDict({"head": ConfigRecord({"kind": [1] * 500_000}), "told": ArrayRecord()})
    message = Message(record, 1, "query.x")
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    envelope = message_to_proto(remove_content_from_message(message))
    link = SuperLink(Parcel(envelope, get_object_tree(message), contents))
    with pytest.raises(ReplyRefused, match="at most 65536 bytes beside its arrays"):
        BoundedPull(grid_to(link), LARGEST)("question 0")


@pytest.mark.parametrize(
    ("spoil", "raised"),
    [
        (without_chunk_ids, "KeyError"),
        (a_record_for_a_message, "another kind of object"),
        (lambda contents: contents.update({an_array(contents): b"Array  3\0{}}"}), "JSONDecodeError"),
        (lambda contents: contents.update({an_array(contents): b"\xff\xff"}), "UnicodeDecodeError"),
        (chunk_named_often(0), "ValueError"),
    ],
)
def test_objects_that_flower_cannot_build_are_about_that_reply_alone(
    grid_to: Callable[..., HttpGrid], spoil: Callable[[dict[str, bytes]], None], raised: str
) -> None:
    spoilt = parcel(spoil=spoil)
    with pytest.raises((KeyError, ValueError, AttributeError)):
        list(reply.metadata for reply in grid_to(SuperLink(spoilt)).pull_messages(["question 0"]))
    with pytest.raises(ReplyRefused, match=raised):
        BoundedPull(grid_to(SuperLink(spoilt)), LARGEST)("question 0")


def test_a_reply_that_is_still_being_sent_keeps_nobody_waiting_and_comes_later(
    grid_to: Callable[..., HttpGrid],
) -> None:
    link = SuperLink(parcel(), parcel({"weight": TENSORS["weight"] + 1}))
    pull = BoundedPull(grid_to(link), LARGEST)
    link.sent = set()
    assert pull("question 0") is None
    link.sent = None
    assert pull("question 0") is not None and pull("question 1") is not None


def test_a_reply_that_was_cut_off_is_an_error_as_of_flowers_own_grid(
    grid_to: Callable[..., HttpGrid],
) -> None:
    whole = parcel(spoil=lambda contents: contents.pop(an_array(contents)))  # type: ignore[arg-type, return-value]
    message = BoundedPull(grid_to(SuperLink(whole)), LARGEST)("question 0")
    assert message is not None and message.has_error()


def test_the_stream_hands_over_the_others_and_says_who_was_left_at_superlink(
    grid_to: Callable[..., HttpGrid],
) -> None:
    class Link(SuperLink):
        def PushMessages(self, request: Any) -> Any:
            raise AssertionError

    grid = grid_to(Link(parcel(spoil=chunk_named_often(3000)), parcel()))
    numbers = iter(("question 0", "question 1"))
    grid.push_messages = lambda messages: [next(numbers)]  # type: ignore[method-assign]
    stream = StreamingGrid(grid)
    asks = [Message(RecordDict(), node, "query.x") for node in (70, 71)]
    replies = list(stream.send_and_receive(asks, timeout=5.0, largest=LARGEST))
    assert [stream.node_of(reply) for reply in replies] == [71]
    assert list(stream.not_pulled) == [70] and "bytes in arrays" in stream.not_pulled[70]
    assert stream.unanswered == {}


def test_a_reply_belongs_to_the_node_that_was_asked_whatever_it_says(
    grid_to: Callable[..., HttpGrid],
) -> None:
    first, second = parcel(), parcel({"weight": TENSORS["weight"] * 2})
    grid = grid_to(SuperLink(first, second))
    numbers = iter(("question 0", "question 1"))
    grid.push_messages = lambda messages: [next(numbers)]  # type: ignore[method-assign]
    stream = StreamingGrid(grid)
    asks = [Message(RecordDict(), node, "query.x") for node in (70, 71)]
    nodes = [stream.node_of(reply) for reply in stream.send_and_receive(asks, timeout=5.0, largest=LARGEST)]
    assert nodes == [70, 71]  # both say that they are of node 1 and answer nothing
