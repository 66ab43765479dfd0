"""The messages: what crosses between the centre and a site, and nothing else.

Four questions with their answers (survey, training round, probe, erasure) and one refusal, as frozen
dataclasses that become Flower records and come back from them. Strict: another wire version, kind, record,
field or type is an error of one line. The plan travels in every question with its hash and is hashed again
on arrival.
What this file does not do: it checks no shapes against a model (`strategies/aggregation.py`), bounds nothing
(`client/release.py`) and trains nothing.

On the wire: one `head` of scalars, tensors as named arrays (`federation/wire.py`), one record of metrics.
Flower routes "train.round" to `@app.train("round")`, "query.survey" to `@app.query("survey")`.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from federation.limits import metric_range
from federation.plan import WIRE_VERSION, RunPlan, WireDtype
from federation.wire import GROWTH, MessageError, RefusalKind, Tensors, array_record, tensors_of
from meduet_models.objective import LossWeights

__all__ = [
    "ERASURE",
    "METRIC_NAMES",
    "PROBE",
    "SURVEY",
    "TRAIN",
    "Ask",
    "ErasureAsk",
    "ErasureReply",
    "Head",
    "MessageError",
    "ProbeAsk",
    "ProbeReply",
    "Refusal",
    "RefusalKind",
    "SurveyAsk",
    "SurveyReply",
    "Tensors",
    "TrainAsk",
    "TrainReply",
    "WireDtype",
    "ask_head",
    "checked_metrics",
    "kind_of",
    "new_head",
    "plan_hash",
]

SURVEY = "query.survey"
TRAIN = "train.round"
ERASURE = "query.erasure"
PROBE = "query.probe"

Scalar = TypeVar("Scalar", int, float, str)

LOSS_TERMS = (
    "total", *(f.name for f in fields(LossWeights)), "proximal", "anchor", "velocity", "alignment",
)  # fmt: skip
METRIC_NAMES = frozenset(
    {f"loss.{term}" for term in LOSS_TERMS}
    | {"seconds", "steps", "grad_norm", "update_norm", "clip_factor", "learning_rate", "teacher_momentum"}
)
"""Everything a site may say about its round in numbers; losses are named `loss.<term>`."""


def plan_hash(plan_json: str) -> str:
    """Hash of a plan's canonical JSON, as `RunPlan.sha256`."""
    return hashlib.sha256(plan_json.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What every question carries: the plan, as its canonical JSON."""

    plan_json: str

    @property
    def plan_sha256(self) -> str:
        """Hash of the plan, 64 hex digits."""
        return plan_hash(self.plan_json)

    def plan(self) -> RunPlan:
        """The plan; raises `ValueError` naming the field that this version does not know or lacks."""
        return RunPlan.from_json(self.plan_json)


@dataclass(frozen=True, kw_only=True)
class SurveyAsk(Ask):
    """Before round 1: tell the sums that describe your scans' appearance."""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        return RecordDict({"head": ask_head("survey_ask", self)})

    @staticmethod
    def from_record(record: RecordDict) -> "SurveyAsk":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "survey_ask", ("head",))
        return head.close(SurveyAsk(plan_json=head.plan_json()))


@dataclass(frozen=True, kw_only=True)
class SurveyReply:
    """A site's appearance as sums over its patients, and its size."""

    plan_sha256: str
    site: str
    moments: Tensors
    num_patients: int
    num_scans: int

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = new_head("survey_reply", plan_sha256=self.plan_sha256, site=self.site)
        head["num_patients"], head["num_scans"] = self.num_patients, self.num_scans
        return RecordDict({"head": head, "moments": array_record(self.moments)})

    @staticmethod
    def from_record(record: RecordDict) -> "SurveyReply":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "survey_reply", ("head", "moments"))
        return head.close(
            SurveyReply(
                plan_sha256=head.take("plan_sha256", str),
                site=head.take("site", str),
                num_patients=head.take("num_patients", int),
                num_scans=head.take("num_scans", int),
                moments=head.tensors("moments"),
            )
        )


@dataclass(frozen=True, kw_only=True)
class TrainAsk(Ask):
    """One round: train from these shared weights, with this style bank.

    `home` is the common start of what stays at the sites; it comes with round 1, or later to a site that
    missed it, and the site keeps it. `wire_dtype` is how the shared weights travel.
    """

    round: int
    shared: Tensors
    bank: Tensors
    home: Tensors | None = None
    wire_dtype: WireDtype = "float32"

    def to_record(self) -> RecordDict:
        """As Flower records. Build it once a round: Flower sends equal arrays once."""
        head = ask_head("train_ask", self)
        head["round"], head["wire_dtype"] = self.round, self.wire_dtype
        shared = array_record(self.shared, self.wire_dtype)
        record = RecordDict({"head": head, "shared": shared, "bank": array_record(self.bank)})
        if self.home is not None:
            record["home"] = array_record(self.home)
        return record

    @staticmethod
    def from_record(record: RecordDict) -> "TrainAsk":
        """Back from Flower records; raises `MessageError`. float32 weights are views: nothing may write."""
        head = Head(record, "train_ask", ("head", "shared", "bank"), optional=("home",))
        wire_dtype = head.wire_dtype()
        return head.close(
            TrainAsk(
                plan_json=head.plan_json(),
                round=head.take("round", int),
                shared=head.tensors("shared", wire_dtype, copy=False),
                bank=head.tensors("bank"),
                home=head.tensors("home") if "home" in record else None,
                wire_dtype=wire_dtype,
            )
        )


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """A site's round: `update` = examples · (weights after - weights before), a vector of sums.

    `wire_dtype` is how the update travels; it is float32 on both ends. What rounding takes away is a share of
    each value (bfloat16) or of its block's largest (mxint8), whatever `examples` is.
    """

    plan_sha256: str
    site: str
    round: int
    examples: int
    update: Tensors
    metrics: dict[str, float] = field(default_factory=dict)
    wire_dtype: WireDtype = "float32"

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = new_head("train_reply", plan_sha256=self.plan_sha256, site=self.site)
        head["round"], head["examples"], head["wire_dtype"] = self.round, self.examples, self.wire_dtype
        return RecordDict(
            {
                "head": head,
                "update": array_record(self.update, self.wire_dtype),
                "metrics": MetricRecord(dict(checked_metrics(self.metrics))),
            }
        )

    @staticmethod
    def from_record(record: RecordDict, copy: bool = True) -> "TrainReply":
        """Back from Flower records; raises `MessageError`.

        Without `copy`, a float32 update is a view of the received bytes, which nothing may write.
        """
        head = Head(record, "train_reply", ("head", "update", "metrics"))
        wire_dtype = head.wire_dtype()
        metrics = record["metrics"]
        if not isinstance(metrics, MetricRecord):
            raise MessageError("Expected record 'metrics' to hold metrics; got another kind of record.")
        return head.close(
            TrainReply(
                plan_sha256=head.take("plan_sha256", str),
                site=head.take("site", str),
                round=head.take("round", int),
                examples=head.take("examples", int),
                update=head.tensors("update", wire_dtype, copy=copy),
                metrics=checked_metrics(metrics),
                wire_dtype=wire_dtype,
            )
        )


@dataclass(frozen=True, kw_only=True)
class ErasureAsk(Ask):
    """After the last round: tell the sums of your pooled content under these weights."""

    shared: Tensors
    bank: Tensors

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ask_head("erasure_ask", self)
        return RecordDict(
            {"head": head, "shared": array_record(self.shared), "bank": array_record(self.bank)}
        )

    @staticmethod
    def from_record(record: RecordDict) -> "ErasureAsk":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "erasure_ask", ("head", "shared", "bank"))
        return head.close(
            ErasureAsk(plan_json=head.plan_json(), shared=head.tensors("shared"), bank=head.tensors("bank"))
        )


@dataclass(frozen=True, kw_only=True)
class ErasureReply:
    """A site's sums of pooled content: count, sum, outer products."""

    plan_sha256: str
    site: str
    moments: Tensors

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = new_head("erasure_reply", plan_sha256=self.plan_sha256, site=self.site)
        return RecordDict({"head": head, "moments": array_record(self.moments)})

    @staticmethod
    def from_record(record: RecordDict) -> "ErasureReply":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "erasure_reply", ("head", "moments"))
        return head.close(
            ErasureReply(
                plan_sha256=head.take("plan_sha256", str),
                site=head.take("site", str),
                moments=head.tensors("moments"),
            )
        )


@dataclass(frozen=True, kw_only=True)
class ProbeAsk(Ask):
    """After a round: tell the sums of your factors under these weights, or the hits of the fitted `probe`."""

    round: int
    shared: Tensors
    bank: Tensors
    probe: Tensors
    """Empty in the first exchange; in the second the site probes that were fitted from the sums."""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ask_head("probe_ask", self)
        head["round"] = self.round
        tensors = {"shared": self.shared, "bank": self.bank, "probe": self.probe}
        return RecordDict({"head": head, **{name: array_record(t) for name, t in tensors.items()}})

    @staticmethod
    def from_record(record: RecordDict) -> "ProbeAsk":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "probe_ask", ("head", "shared", "bank", "probe"))
        return head.close(
            ProbeAsk(
                plan_json=head.plan_json(),
                round=head.take("round", int),
                shared=head.tensors("shared"),
                bank=head.tensors("bank"),
                probe=head.tensors("probe"),
            )
        )


@dataclass(frozen=True, kw_only=True)
class ProbeReply:
    """A site's sums, or its hits."""

    plan_sha256: str
    site: str
    round: int
    sums: Tensors

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = new_head("probe_reply", plan_sha256=self.plan_sha256, site=self.site)
        head["round"] = self.round
        return RecordDict({"head": head, "sums": array_record(self.sums)})

    @staticmethod
    def from_record(record: RecordDict) -> "ProbeReply":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "probe_reply", ("head", "sums"))
        return head.close(
            ProbeReply(
                plan_sha256=head.take("plan_sha256", str),
                site=head.take("site", str),
                round=head.take("round", int),
                sums=head.tensors("sums"),
            )
        )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A site's no, in one word of a closed list. `site` is empty when the site could not be opened."""

    kind: RefusalKind
    site: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        return RecordDict({"head": new_head("refusal", site=self.site, reason=self.kind.value)})

    @staticmethod
    def from_record(record: RecordDict) -> "Refusal":
        """Back from Flower records; raises `MessageError`."""
        head = Head(record, "refusal", ("head",))
        reason = head.take("reason", str)
        if reason not in {kind.value for kind in RefusalKind}:
            raise MessageError(f"Expected a refusal of a known kind; got {reason[:40]!r}.")
        return head.close(Refusal(kind=RefusalKind(reason), site=head.take("site", str)))


def kind_of(record: RecordDict) -> str:
    """The kind of message `record` says it is ("train_reply", "refusal", ...); raises `MessageError`."""
    head = record.get("head")
    kind = head.get("kind") if isinstance(head, ConfigRecord) else None
    if not isinstance(kind, str):
        raise MessageError("Expected a record 'head' with its kind; got none.")
    return kind


def new_head(kind: str, **values: str) -> ConfigRecord:
    """The scalars of a message of this kind."""
    return ConfigRecord({"wire_version": WIRE_VERSION, "kind": kind, **values})


def ask_head(kind: str, ask: Ask) -> ConfigRecord:
    """The scalars of a question: its kind and the plan."""
    return new_head(kind, plan_json=ask.plan_json, plan_sha256=ask.plan_sha256)


def checked_metrics(metrics: Mapping[str, object]) -> dict[str, float]:
    """Numbers of agreed names, each within its range (`metric_range`); raises `MessageError` for others."""
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


Message = TypeVar("Message")


class Head:
    """The scalars of one message, taken out one by one; what is left over at the end is an error."""

    def __init__(
        self, record: RecordDict, kind: str, records: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> None:
        head = record.get("head")
        if not isinstance(head, ConfigRecord):
            raise MessageError("Expected a record 'head'; got none.")
        self._record, self._values = record, dict(head)
        if (version := self.take("wire_version", int)) != WIRE_VERSION:
            text = f"Expected wire version {WIRE_VERSION}; got {version}. Update the older side."
            raise MessageError(text, RefusalKind.WRONG_VERSION)
        if (came := self.take("kind", str)) != kind:
            raise MessageError(f"Expected a {kind}; got {came[:40]!r}.")
        if missing := sorted(set(records) - set(record)):
            raise MessageError(f"Expected record {missing[0]!r} in a {kind}; it is missing.")
        if unknown := sorted(set(record) - set(records) - set(optional)):
            raise MessageError(f"Expected no record {unknown[0][:40]!r} in a {kind}.")

    def take(self, name: str, kind: type[Scalar]) -> Scalar:
        """A field of this type, once; raises `MessageError`."""
        value = self._values.pop(name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise MessageError(f"Expected field {name!r} to be {kind.__name__}; got {type(value).__name__}.")
        return value

    def plan_json(self) -> str:
        """The plan's JSON, whose hash is what the message says."""
        text, said = self.take("plan_json", str), self.take("plan_sha256", str)
        if plan_hash(text) != said:
            raise MessageError(f"Expected a plan of hash {said[:12]}; it hashes to {plan_hash(text)[:12]}.")
        return text

    def wire_dtype(self) -> WireDtype:
        """How the message's values travel."""
        said = self.take("wire_dtype", str)
        for wire_dtype in GROWTH:
            if said == wire_dtype:
                return wire_dtype
        raise MessageError(f"Expected wire_dtype {', '.join(GROWTH)}; got {said[:40]!r}.")

    def tensors(self, name: str, wire_dtype: WireDtype = "float32", copy: bool = True) -> Tensors:
        """The arrays of a record, as tensors."""
        record = self._record[name]
        if not isinstance(record, ArrayRecord):
            raise MessageError(f"Expected record {name!r} to hold arrays; got another kind of record.")
        return tensors_of(record, wire_dtype, copy)

    def close(self, message: Message) -> Message:
        """The message, unless the head holds more than was taken."""
        if self._values:
            raise MessageError(f"Expected no field {min(self._values)[:40]!r} in the head.")
        return message
