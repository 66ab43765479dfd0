"""The messages: what crosses between the centre and a site, and how it is written down.

A message is a frozen dataclass; the types of its fields say how they travel, and one codec writes and reads
them all. Strict: another wire version, kind, record, field or type is an error of one line. The plan travels
in every question with its hash and is hashed again on arrival. Which messages there are, and what they mean,
say the files of `federation/exchanges/`; here is only the refusal, which answers any question.
What this file does not do: it checks no shapes against a model (`strategies/aggregation.py`), bounds nothing
(`client/release.py`) and trains nothing.

On the wire: one `head` of scalars, tensors as named arrays (`federation/wire/wire.py`), one record of
metrics.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Generic, Protocol, Self, TypeVar, get_type_hints

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from federation.plan.plan import WIRE_VERSION, RunPlan, WireDtype
from federation.wire.limits import metric_range
from federation.wire.wire import (
    GROWTH,
    MessageError,
    RefusalKind,
    Tensors,
    array_record,
    bytes_of,
    bytes_record,
    tensors_of,
)
from forms.json_text import sha256_of
from meduet_models.objective.settings import LossWeights
from meduet_models.weights import sha256_of_tensors

__all__ = [
    "METRIC_NAMES",
    "Arrays",
    "Ask",
    "Carrier",
    "Converted",
    "Message",
    "MessageError",
    "Metrics",
    "Refusal",
    "RefusalKind",
    "Reply",
    "RoundedTensors",
    "Scalar",
    "SealedBytes",
    "Tensors",
    "WireDtype",
    "kind_of",
    "plan_hash",
]

LOSS_TERMS = (
    "total", *(f.name for f in fields(LossWeights)), "proximal", "anchor", "velocity", "alignment",
)  # fmt: skip
METRIC_NAMES = frozenset(
    {f"loss.{term}" for term in LOSS_TERMS}
    | {"seconds", "steps", "grad_norm", "update_norm", "clip_factor", "learning_rate", "teacher_momentum"}
)
"""Everything a site may say about its round in numbers; losses are named `loss.<term>`."""

_HEAD = "head"
Value = TypeVar("Value", bound=int | float | str)
From = TypeVar("From")


def plan_hash(plan_json: str) -> str:
    """Hash of a plan's canonical JSON, as `RunPlan.sha256`."""
    return sha256_of(plan_json)


class Carrier(Protocol):
    """How one field is written into a record and read back."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """Write the field `name` of a message that travels as `wire_dtype`."""

    def take(self, source: "_Source", name: str) -> Any:
        """Read it; raises `MessageError`."""


class _Source:
    """A record whose parts are taken out one by one; what is left over at the end is an error."""

    def __init__(self, record: RecordDict, kind: str, copy: bool) -> None:
        head = record.get(_HEAD)
        if not isinstance(head, ConfigRecord):
            raise MessageError("Expected a record 'head'; got none.")
        self.copy = copy
        self.wire_dtype: WireDtype = "float32"
        self._kind, self._values = kind, dict(head)
        self._records = {name: part for name, part in record.items() if name != _HEAD}
        if (version := self.scalar("wire_version", int)) != WIRE_VERSION:
            text = f"Expected wire version {WIRE_VERSION}; got {version}. Update the older side."
            raise MessageError(text, RefusalKind.WRONG_VERSION)
        if (came := self.scalar("kind", str)) != kind:
            raise MessageError(f"Expected a {kind}; got {came[:40]!r}.")

    def scalar(self, name: str, kind: type[Value]) -> Value:
        """A scalar of the head."""
        value = self._values.pop(name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise MessageError(f"Expected field {name!r} to be {kind.__name__}; got {type(value).__name__}.")
        return value

    def record(self, name: str, kind: type[From], optional: bool = False) -> From | None:
        """A record of this type; None where it may be, and is, left out."""
        part = self._records.pop(name, None)
        if part is None and optional:
            return None
        if part is None:
            raise MessageError(f"Expected record {name!r} in a {self._kind}; it is missing.")
        if not isinstance(part, kind):
            what = "arrays" if kind is ArrayRecord else "metrics"
            raise MessageError(f"Expected record {name!r} to hold {what}; got another kind of record.")
        return part

    def close(self) -> None:
        """Refuse what was not taken."""
        if self._records:
            raise MessageError(f"Expected no record {min(self._records)[:40]!r} in a {self._kind}.")
        if self._values:
            raise MessageError(f"Expected no field {min(self._values)[:40]!r} in the head.")


def _head(record: RecordDict) -> ConfigRecord:
    head: ConfigRecord = record.config_records[_HEAD]
    return head


@dataclass(frozen=True)
class Scalar:
    """A whole number or a text, in the head; `name` where it is another than the field's."""

    kind: type[int] | type[str]
    name: str = ""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        _head(record)[self.name or name] = self.kind(value)

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        return source.scalar(self.name or name, self.kind)


class PlanText:
    """The plan's JSON and, beside it, its hash, which must be that of the text."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        _head(record)[name], _head(record)["plan_sha256"] = value, plan_hash(value)

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        text, said = source.scalar(name, str), source.scalar("plan_sha256", str)
        if plan_hash(text) != said:
            raise MessageError(f"Expected a plan of hash {said[:12]}; it hashes to {plan_hash(text)[:12]}.")
        return text


class _WireDtypeName:
    """How the values of a message travel."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        _head(record)[name] = value

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        said = source.scalar(name, str)
        for wire_dtype in GROWTH:
            if said == wire_dtype:
                source.wire_dtype = wire_dtype
                return wire_dtype
        raise MessageError(f"Expected wire_dtype {', '.join(GROWTH)}; got {said[:40]!r}.")


class _RefusalWord:
    """A word of the closed list."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        _head(record)["reason"] = value.value

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        reason = source.scalar("reason", str)
        if reason not in {kind.value for kind in RefusalKind}:
            raise MessageError(f"Expected a refusal of a known kind; got {reason[:40]!r}.")
        return RefusalKind(reason)


@dataclass(frozen=True)
class Arrays:
    """Tensors, as arrays in a record of their own."""

    rounded: bool = False
    """Whether they travel in the message's `wire_dtype`, instead of as they are."""
    optional: bool = False
    """Whether they may be left out (None)."""
    view: bool = False
    """Whether float32 tensors are read as views of the received bytes, which nothing may write."""
    masked: bool = False
    """Whether they are the uint32 tensors of a secure sum, and nothing else."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        if value is not None:
            record[name] = array_record(value, wire_dtype if self.rounded else "float32", self.masked)

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        part = source.record(name, ArrayRecord, self.optional)
        if part is None:
            return None
        copy = source.copy and not self.view
        return tensors_of(part, source.wire_dtype if self.rounded else "float32", copy, self.masked)


@dataclass(frozen=True)
class Converted(Generic[From]):
    """A value that travels as another: `to` and `back` are each other's inverse; `back` raises
    `MessageError`."""

    to: Callable[[From], Any]
    back: Callable[[Any], From]
    carrier: Carrier
    name: str = ""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        self.carrier.put(record, self.name or name, self.to(value), wire_dtype)

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        return self.back(self.carrier.take(source, self.name or name))


class SealedBytes:
    """Bytes that are sealed to somebody: on the way they are bytes."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        record[name] = bytes_record(value)

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        part = source.record(name, ArrayRecord)
        assert part is not None, "not optional"
        return bytes_of(part)


class _Numbers:
    """Numbers of agreed names, each within its range (`metric_range`)."""

    def put(self, record: RecordDict, name: str, value: Any, wire_dtype: WireDtype) -> None:
        """As `Carrier`."""
        record[name] = MetricRecord(dict(_checked(value)))

    def take(self, source: _Source, name: str) -> Any:
        """As `Carrier`."""
        return _checked(source.record(name, MetricRecord) or {})


def _checked(metrics: Mapping[str, object]) -> dict[str, float]:
    for name, value in metrics.items():
        if name not in METRIC_NAMES:
            raise MessageError(f"Expected metrics of the agreed names; got {name[:40]!r}.")
        if not isinstance(value, float) or not math.isfinite(value):
            came = value if isinstance(value, float) else type(value).__name__
            raise MessageError(f"Expected metric {name!r} to be a finite float; got {came}.")
        least, largest = metric_range(name)
        if not least <= value <= largest:
            raise MessageError(f"Expected metric {name!r} from {least:g} to {largest:g}; got {value:g}.")
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


RoundedTensors = Annotated[Tensors, Arrays(rounded=True)]
"""Tensors that travel in the message's `wire_dtype`; they are float32 on both ends."""
Metrics = Annotated[dict[str, float], _Numbers()]
"""What a site says about its round in numbers (`METRIC_NAMES`)."""
_CARRIERS: dict[Any, Carrier] = {
    int: Scalar(int),
    str: Scalar(str),
    Tensors: Arrays(),
    Tensors | None: Arrays(optional=True),
    WireDtype: _WireDtypeName(),
    RefusalKind: _RefusalWord(),
}
"""How a field of a plain type travels; other types name their carrier."""


@cache
def _carriers(message: type[Any]) -> dict[str, Carrier]:
    """The carrier of each field: `wire_dtype` first, since others are read by it."""
    hints = get_type_hints(message, include_extras=True)
    found = {}
    for field in sorted(fields(message), key=lambda field: field.name != "wire_dtype"):
        hint = hints[field.name]
        found[field.name] = hint.__metadata__[0] if hasattr(hint, "__metadata__") else _CARRIERS[hint]
    return found


@dataclass(frozen=True, kw_only=True)
class Message:
    """What crosses. A subclass names its kind: `class SurveyAsk(Ask, kind="survey_ask")`."""

    kind_name: ClassVar[str] = ""

    def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
        """Note the kind under which messages of this class travel."""
        super().__init_subclass__(**options)
        cls.kind_name = kind

    def to_record(self) -> RecordDict:
        """As Flower records. Build a question once a round: Flower sends equal arrays once."""
        record = RecordDict({_HEAD: ConfigRecord({"wire_version": WIRE_VERSION, "kind": self.kind_name})})
        wire_dtype: WireDtype = getattr(self, "wire_dtype", "float32")
        kind: Any = type(self)
        for name, carrier in _carriers(kind).items():
            carrier.put(record, name, getattr(self, name), wire_dtype)
        return record

    @classmethod
    def from_record(cls, record: RecordDict, copy: bool = True) -> Self:
        """Back from Flower records; raises `MessageError`.

        Without `copy`, float32 tensors are views of the received bytes, which nothing may write.
        """
        source = _Source(record, cls.kind_name, copy)
        kind: Any = cls
        message = cls(**{name: carrier.take(source, name) for name, carrier in _carriers(kind).items()})
        source.close()
        message.agrees()
        return message

    def agrees(self) -> None:
        """Raise `MessageError` where fields that came contradict each other."""


@dataclass(frozen=True, kw_only=True)
class Ask(Message):
    """What every question carries: the plan, as its canonical JSON."""

    plan_json: Annotated[str, PlanText()]

    @property
    def plan_sha256(self) -> str:
        """Hash of the plan, 64 hex digits."""
        return plan_hash(self.plan_json)

    def plan(self) -> RunPlan:
        """The plan; raises `ValueError` naming the field that this version does not know or lacks."""
        return RunPlan.from_json(self.plan_json)

    def sha256(self) -> str:
        """Hash of everything that is asked, 64 hex digits: the same question, whatever way it travelled."""
        digest = hashlib.sha256(self.kind_name.encode())
        for field in sorted(fields(self), key=lambda field: field.name):
            value = getattr(self, field.name)
            said = _tensors_hash(value) if isinstance(value, dict) else repr(value)
            digest.update(f"\0{field.name}\0{said}".encode())
        return digest.hexdigest()


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    return sha256_of_tensors(tensors) if tensors else "none"


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """What every answer carries: under which plan, and from whom."""

    plan_sha256: str
    site: str


@dataclass(frozen=True, kw_only=True)
class Refusal(Message, kind="refusal"):
    """A site's no, in one word of a closed list. `site` is empty when the site could not be opened."""

    kind: RefusalKind
    site: str = ""


def kind_of(record: RecordDict) -> str:
    """The kind of message `record` says it is ("train_reply", "refusal", ...); raises `MessageError`."""
    head = record.get(_HEAD)
    kind = head.get("kind") if isinstance(head, ConfigRecord) else None
    if not isinstance(kind, str):
        raise MessageError("Expected a record 'head' with its kind; got none.")
    return kind
