"""Pulling a reply from SuperLink: nothing is pulled, and nothing inflated, that the plan does not allow.

A message lies at SuperLink as a tree of objects: message, records, arrays, chunks of arrays. Flower's own
grid pulls whatever the tree names and builds whatever the objects say; an array may name one chunk as often
as it likes, so that 56 kB become 640 MB, and a broken object ends the program that pulls it. Here the objects
are counted before the first is asked for, their bytes while they come, and what the arrays would grow to
before any is built. A site that has announced a reply and is still sending it keeps nobody waiting: its reply
is looked at again in the next pass.

What this file does not do: it reads no message (`strategies/reply_wall.py`). What the connection to SuperLink
itself raises is the centre's own trouble, not a reply's, and passes.
Source: flwr 1.41, `HttpGrid.pull_messages`; a private client, pinned with Flower.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import HEAD_BODY_DIVIDER, SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid

from federation.wire.limits import Largest
from strategies.aggregation import ReplyRefused

_HEAD_OF_OBJECT = 256  # bytes: its kind and length; names of children come on top
_NAME_OF_CHILD = 65  # bytes: a hash and a comma
_ARRAY, _CHUNK = "Array", "ArrayChunk"


class _NotYet(Exception):
    """An object that the site has announced and not sent yet."""

    def __init__(self, identity: str) -> None:
        super().__init__(identity)
        self.identity = identity


class _Lost(Exception):
    """An object that the site announced and will not send: it was cut off."""


@dataclass
class _Announced:
    """A reply at SuperLink."""

    message: str
    """Identity of the message, which is its outermost object."""
    objects: list[str]
    waits_for: str
    """The object to look for first."""


class BoundedPull:
    """Pulls replies from SuperLink through Flower's grid, each within the size of the largest reply."""

    def __init__(self, grid: HttpGrid, largest: Largest) -> None:
        self._grid, self._largest = grid, largest
        self._announced: dict[str, _Announced] = {}

    def __call__(self, question: str) -> Message | None:
        """The reply to the question of this identity, or None while it is not there as a whole.

        A reply that was cut off on its way is an error message, as of Flower's own grid. Raises
        `ReplyRefused` when the reply is larger than allowed, or nothing that Flower can build.
        """
        announced = self._announced.pop(question, None) or self._look(question)
        if announced is None:
            return None
        try:
            contents = self._contents(announced)
        except _NotYet as waiting:
            announced.waits_for = waiting.identity  # what came meanwhile is dropped: memory holds one reply
            self._announced[question] = announced
            return None
        except _Lost:
            return self._cut_off(question)
        except ReplyRefused:
            self._confirm(announced.message)
            raise
        self._confirm(announced.message)
        return inflated(announced.message, contents, self._largest)

    def _look(self, question: str) -> _Announced | None:
        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=[question]))
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            identity = message.metadata.message_id
            names = list(_names(tree))
            if len(names) > self._largest.num_objects or tree.object_id != identity:
                self._confirm(identity)
                raise ReplyRefused(
                    f"Expected a reply of at most {self._largest.num_objects} objects; got {len(names)}."
                )
            return _Announced(identity, list(dict.fromkeys(names)), waits_for=identity)  # it is sent last
        return None

    def _contents(self, announced: _Announced) -> dict[str, bytes]:
        counted, lock = _Counted(self._largest), threading.Lock()

        def pull(identity: str) -> bytes:
            content = self._object(identity)
            with lock:
                counted.add(content)
            return content

        self._object(announced.waits_for)
        return pull_objects(announced.objects, pull)

    def _object(self, identity: str) -> bytes:
        request = PullObjectRequest(node=self._grid.node, run_id=self._grid.run.run_id, object_id=identity)
        found = self._grid._runtime_client.PullObject(request)
        if not found.object_found:
            raise _Lost
        if not found.object_available:
            raise _NotYet(identity)
        content: bytes = found.object_content
        return content

    def _cut_off(self, question: str) -> Message:
        node, run = self._grid.node.node_id, self._grid.run.run_id
        metadata = Metadata(
            run_id=run,
            message_id="",
            src_node_id=node,
            dst_node_id=node,
            reply_to_message_id=question,
            group_id="",
            created_at=now().timestamp(),
            ttl=0,
            message_type=SYSTEM_MESSAGE_TYPE,
        )
        error = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="cut off while it was sent")
        return make_message(metadata=metadata, error=error)

    def _confirm(self, message: str) -> None:
        """SuperLink may forget it."""
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=message
        )
        self._grid._runtime_client.ConfirmMessageReceived(request)


class _Counted:
    """Bytes of the objects of one reply, as they come."""

    def __init__(self, largest: Largest) -> None:
        self._largest = largest
        self._arrays = self._head = 0

    def add(self, content: bytes) -> None:
        """Count an object; raises `ReplyRefused` when it is one too many."""
        if content.startswith(_CHUNK.encode() + b" "):
            self._arrays += len(content) - _HEAD_OF_OBJECT
            _check_bytes(self._arrays, self._largest)
            return
        head = content.find(HEAD_BODY_DIVIDER)
        self._head += len(content) - min(head, _HEAD_OF_OBJECT + _NAME_OF_CHILD * self._largest.num_objects)
        if self._head > self._largest.head_bytes:
            raise ReplyRefused(
                f"Expected a reply of at most {self._largest.head_bytes} bytes beside its arrays; got more."
            )


def inflated(message: str, contents: Mapping[str, bytes], largest: Largest) -> Message:
    """The message of this identity from the contents of its objects; `contents` are not kept.

    Raises `ReplyRefused` when its arrays would be larger than allowed, and when Flower cannot build it.
    """
    try:
        _check_bytes(sum(_sizes_of_arrays(contents)), largest)
        built = inflate_object_from_contents(message, dict(contents))
    except ReplyRefused:
        raise
    except Exception as error:  # a wall: whatever the objects of a site make Flower raise is about that reply
        raise ReplyRefused(
            f"Expected a reply that Flower can build; building it raised {type(error).__name__}."
        ) from error
    if not isinstance(built, Message):
        raise ReplyRefused("Expected a message of Flower's; got another kind of object.")
    built.metadata.__dict__["_message_id"] = message  # as Flower's own grids do
    return built


def _sizes_of_arrays(contents: Mapping[str, bytes]) -> Iterator[int]:
    """What each array would grow to, in bytes."""
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == _ARRAY:
            body = content[content.find(HEAD_BODY_DIVIDER) + 1 :]
            sizes = [len(contents[child]) - _HEAD_OF_OBJECT for child in children]
            yield sum(sizes[place] for place in json.loads(body)["arraychunk_ids"])


def _check_bytes(came: int, largest: Largest) -> None:
    if came > largest.array_bytes:
        raise ReplyRefused(f"Expected a reply of at most {largest.array_bytes} bytes in arrays; got more.")


def _names(tree: ObjectTree) -> Iterator[str]:
    """Identities of all objects of a tree, as often as it names them."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        waiting.extend(one.children)
        yield one.object_id
