"""Replies that no honest site sends: a valid one, changed at random in its bytes, shapes, names and values.

`Mutator` changes records, as a site with the right library could write them, and then the objects into which
Flower divides a message, as a site without any library could. All draws come from one `random.Random`, so
that hypothesis and a seed drive the same code.
"""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from numpy.typing import NDArray

INTEGERS = (0, 1, -1, 2, 7, 255, 1 << 20, (1 << 20) + 1, 3_000_000_000, 1 << 40, (1 << 63) - 1, -(1 << 63))
TEXTS = ("", "x", "oslo", "turin", "atlantis", "\x1b[2J\x1b[31m", "../../etc", "\u202eolso", "x" * 3000)
REALS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-300,
    3e9,
    1e15,
    1e30,
    -1e30,
    1.7e308,
    -1.7e308,
    math.inf,
    -math.inf,
    math.nan,
)
DESCRS = ("<f4", "<f8", "<u2", "|i1", "|u1", "|O", ">f4", "<c8", "|V8", "<U9")
Contents = dict[str, bytes]


def objects(record: RecordDict) -> tuple[str, Contents]:
    """The identity of a message with this content, and the contents of its objects by identity."""
    with no_object_id_recompute():
        message = Message(record, 1, "query.x")
        message.metadata.__dict__["_message_id"] = message.object_id
        nested = get_all_nested_objects(message)
        return message.object_id, {name: one.deflate() for name, one in nested.items()}


def copied(record: RecordDict) -> RecordDict:
    """The same record; changing it leaves the first as it is."""
    parts: dict[str, Any] = {}
    for name, part in record.items():
        if isinstance(part, ArrayRecord):
            parts[name] = ArrayRecord({n: Array(a.dtype, a.shape, a.stype, a.data) for n, a in part.items()})
        else:
            parts[name] = type(part)(dict(part))
    return RecordDict(parts)


def row(array: Array) -> NDArray[Any]:
    """The values of an array, whatever its header says; none if they are not numbers in a row."""
    kinds = {"uint8": "u1", "float32": "<f4", "float64": "<f8"}
    start = 10 + int.from_bytes(array.data[8:10], "little")
    kind = np.dtype(kinds.get(array.dtype, "u1"))
    whole = max(0, len(array.data) - start) // kind.itemsize * kind.itemsize
    return np.frombuffer(array.data[start : start + whole], dtype=kind)


class Mutator:
    """Changes drawn from `draws`."""

    def __init__(self, draws: random.Random) -> None:
        self.draws = draws

    def reply(self, valid: RecordDict) -> tuple[str, Contents]:
        """A changed reply as objects: the identity of its message, and their contents."""
        record = copied(valid)
        if self.draws.random() < 0.8:
            for _ in range(self.draws.choice((1, 1, 2, 3))):
                self.draws.choice(self._OF_RECORDS)(self, record)
        message, contents = objects(record)
        if self.draws.random() < 0.25:
            self.draws.choice(self._OF_OBJECTS)(self, contents)
        return message, contents

    # records

    def _scalar(self, record: RecordDict) -> None:
        head = record.get("head")
        if isinstance(head, ConfigRecord) and head:
            name = self.draws.choice(sorted(head))
            odd: list[Any] = [*INTEGERS, *TEXTS, *REALS, True, b"\x00", [1, 2], ["a"], head[name]]
            head[name] = self.draws.choice(odd)

    def _whole_number(self, record: RecordDict) -> None:
        head = record.get("head")
        names = [n for n, v in dict(head or {}).items() if type(v) is int]
        if isinstance(head, ConfigRecord) and names:
            head[self.draws.choice(sorted(names))] = self.draws.choice(INTEGERS)

    def _scalars(self, record: RecordDict) -> None:
        head = record.get("head")
        if isinstance(head, ConfigRecord) and head:
            if self.draws.random() < 0.5:
                del head[self.draws.choice(sorted(head))]
            else:
                head[self.draws.choice(TEXTS)] = self.draws.choice(INTEGERS)

    def _records(self, record: RecordDict) -> None:
        if not record:  # the only one is gone already
            return
        name = self.draws.choice(sorted(record))
        part: Any = self.draws.choice(
            (ArrayRecord(), MetricRecord({"x": 1.0}), ConfigRecord({"x": 1}), copied(record)[name])
        )
        other = self.draws.choice((name, *TEXTS))
        if self.draws.random() < 0.3:
            del record[name]
        else:
            record[other] = part

    def _metric(self, record: RecordDict) -> None:
        parts = [part for part in record.values() if isinstance(part, MetricRecord)]
        if parts:
            part = self.draws.choice(parts)
            name = self.draws.choice((*sorted(part), "loss.total", "seconds", "patient", "\x1b]0;"))
            odd: list[Any] = [*REALS, *INTEGERS[:9], [1.0, 2.0], [3]]
            part[name] = self.draws.choice(odd)

    def _array(self, record: RecordDict) -> tuple[ArrayRecord, str] | None:
        parts = [part for part in record.values() if isinstance(part, ArrayRecord) and part]
        if not parts:
            return None
        part = self.draws.choice(parts)
        return part, self.draws.choice(sorted(part))

    def _with_data(self, record: RecordDict, change: Callable[[bytes], bytes]) -> None:
        if (found := self._array(record)) is not None:
            part, name = found
            array = part[name]
            part[name] = Array(array.dtype, array.shape, array.stype, change(array.data))

    def _bytes_of_array(self, record: RecordDict) -> None:
        self._with_data(record, self._damaged)

    def _header(self, record: RecordDict) -> None:
        shape = self.draws.choice(("()", "(3,)", "(2, 3)", f"({1 << 41},)", "(-1,)", "(1" + "," * 70 + ")"))
        text = "{{'descr': '{}', 'fortran_order': {}, 'shape': {}, }}".format(
            self.draws.choice(DESCRS),
            self.draws.choice(("False", "True", "1L", "__import__('os')")),
            shape,
        )
        version = self.draws.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff"))

        def change(data: bytes) -> bytes:
            end = 10 + int.from_bytes(data[8:10], "little")
            header = text.encode().ljust(117) + b"\n"
            return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data[end:]

        self._with_data(record, change)

    def _arrays(self, record: RecordDict) -> None:
        if (found := self._array(record)) is None:
            return
        part, name = found
        array = part[name]
        match self.draws.randrange(5):
            case 0:
                del part[name]
            case 1:
                part[self.draws.choice(("float32", "float64", "mxint8", "stray", *TEXTS))] = array
            case 2:
                part[name] = Array(array.dtype, array.shape, self.draws.choice(TEXTS), array.data)
            case 3:
                part[name] = Array(self.draws.choice(TEXTS), array.shape, array.stype, array.data)
            case _:
                shape = self.draws.choice(((), (1,) * 70, (1 << 40,), (-1,), array.shape * 2))
                part[name] = Array(array.dtype, shape, array.stype, array.data)

    def _index(self, record: RecordDict) -> None:
        parts = [part for part in record.values() if isinstance(part, ArrayRecord) and "index" in part]
        if not parts:
            return
        part = self.draws.choice(parts)
        try:
            entries = json.loads(row(part["index"]).tobytes())
            entry = self.draws.choice(entries)
            self._entry(entries, entry)
            text = json.dumps(entries)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError):
            text = self.draws.choice(("[" * 5000, "{}", "nan", "1" * 5000, '[["a"]]', ""))
        if self.draws.random() < 0.1:
            text = self.draws.choice(("[" * 5000, "[[]]" * 9, "NaN", "1" * 5000, '["' + "x" * 5000))
        part["index"] = Array(np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8))

    def _entry(self, entries: list[Any], entry: list[Any]) -> None:
        sizes: list[Any] = [*INTEGERS, 1.0, "3", None, True]
        match self.draws.randrange(8):
            case 0:
                entry[2] = entry[2] + [1] * self.draws.choice((1, 5, 70, 3000))
            case 1:
                entry[2] = [self.draws.choice(sizes) for _ in range(self.draws.randrange(4))]
            case 2:
                entry[2] = list(reversed(entry[2]))
            case 3:
                entry[0] = self.draws.choice((*TEXTS, 3, None))
            case 4:
                entry[1] = self.draws.choice(("float32", "float64", "bfloat16", "mxint8", "int64", 7))
            case 5:
                entries.remove(entry)
            case 6:
                entries.append(list(entry))
            case _:
                entries.insert(0, self.draws.choice((entry[:2], [], "x", {"a": 1})))

    def _values(self, record: RecordDict) -> None:
        """Values that are well written and mean nothing: the first is a count in many sums."""
        parts = [part for part in record.values() if isinstance(part, ArrayRecord)]
        rows = [(part, n) for part in parts for n in sorted(part) if n in ("float32", "float64")]
        if not rows:
            return
        part, name = self.draws.choice(rows)
        values = row(part[name]).copy()
        if not len(values) or values.dtype.kind != "f":
            return
        with np.errstate(all="ignore"):
            place = self.draws.choice((0, 0, self.draws.randrange(len(values))))
            match self.draws.randrange(7):
                case 0:
                    values[place] = self.draws.choice(REALS)
                case 1:
                    values *= self.draws.choice((-1.0, 0.0, 2.0, 1e-12, 1e6, 1e30))
                case 2:
                    values[:] = self.draws.choice(REALS)
                case 3:
                    values[place] += self.draws.choice((0.5, 1.0, -1.0, 1e3, 1e15, 3e9))
                case 4:
                    values[1:] *= self.draws.choice((-1.0, 0.0, 3.0))
                case 5:
                    values = -values[::-1].copy()
                case _:
                    values[self.draws.randrange(len(values)) :] = self.draws.choice(REALS)
        part[name] = Array(values)

    _OF_RECORDS = (
        _scalar, _whole_number, _whole_number, _scalars, _records, _metric, _metric, _bytes_of_array, _header,
        _arrays, _index, _index, _values, _values, _values, _values,
    )  # fmt: skip

    # objects

    def _damaged(self, data: bytes) -> bytes:
        changed = bytearray(data)
        match self.draws.randrange(5):
            case 0:
                del changed[self.draws.randrange(len(changed) + 1) :]
            case 1:
                changed += bytes(self.draws.randrange(1, 300))
            case 2 if changed:
                changed[self.draws.randrange(min(len(changed), 130))] ^= 1 << self.draws.randrange(8)
            case _:
                for _ in range(self.draws.randrange(1, 6) if changed else 0):
                    changed[self.draws.randrange(len(changed))] = self.draws.randrange(256)
        return bytes(changed)

    def _bytes_of_object(self, contents: Contents) -> None:
        name = self.draws.choice(list(contents))
        contents[name] = self._damaged(contents[name])

    def _exchanged(self, contents: Contents) -> None:
        one, other = self.draws.choice(list(contents)), self.draws.choice(list(contents))
        contents[one], contents[other] = contents[other], contents[one]

    def _lost(self, contents: Contents) -> None:
        del contents[self.draws.choice(list(contents))]

    def _chunks(self, contents: Contents) -> None:
        arrays = [name for name, content in contents.items() if content.startswith(b"Array ")]
        if not arrays:
            return
        name = self.draws.choice(arrays)
        head, body = contents[name].split(b"\0", 1)
        fields = json.loads(body)
        odd: list[Any] = [
            *([0] * times for times in (0, 2, 300, 30_000)), [-1], [5], ["0"], [[0]], [0.0], None, 0, "0",
        ]  # fmt: skip
        fields["arraychunk_ids"] = self.draws.choice(odd)
        if self.draws.random() < 0.2:
            del fields[self.draws.choice(sorted(fields))]
        body = json.dumps(fields).encode()
        kind, children, _ = head.decode().split(" ")
        if self.draws.random() < 0.2:
            children = ",".join([children] * 3)
        contents[name] = f"{kind} {children} {len(body)}".encode() + b"\0" + body

    def _kind(self, contents: Contents) -> None:
        name = self.draws.choice(list(contents))
        kinds = (b"Array", b"ArrayChunk", b"ArrayRecord", b"Message", b"RecordDict", b"Object", b"")
        _, rest = contents[name].split(b" ", 1)
        contents[name] = self.draws.choice(kinds) + b" " + rest

    _OF_OBJECTS = (_bytes_of_object, _bytes_of_object, _exchanged, _lost, _chunks, _chunks, _kind)
