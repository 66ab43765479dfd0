"""Frames: what a run and the processes of its sites say to each other over a pipe, a kind and then bytes.

Messages of the federation go in them as Flower writes them for the wire, everything else as JSON or text;
nothing is an object of Python's.
What this file does not do: it knows neither sites nor processes.
"""

import struct
from typing import IO

OPEN, READ, ASK = b"O", b"R", b"A"
"""To a process: the consortium (JSON), a hospital to be read (its name), a question (number of the site, then
a message)."""
PROGRESS, STEP, DONE = b"P", b"S", b"D"
"""From a process: [what, done, total] and [site, step, loss] (JSON), then the answer that ends a job."""
SITE = struct.Struct(">I")
"""The number of the site that a question is for."""
_HEAD = struct.Struct(">cQ")


def write_frame(stream: IO[bytes], kind: bytes, content: bytes = b"") -> None:
    """Write one frame, at once. Raises `OSError` when nobody reads."""
    stream.write(_HEAD.pack(kind, len(content)))
    stream.write(content)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """Kind and content of the next frame. Raises `EOFError` when the other side has ended."""
    kind, length = _HEAD.unpack(_exactly(stream, _HEAD.size))
    return kind, _exactly(stream, length)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError("The other side has ended.")
    return content
