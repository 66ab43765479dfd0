"""The record of an audit, `audit.json`: every number of the page, bound to the hash of what it speaks of.

Read strictly: a field that is missing, unknown or of another kind is refused, so that a page is never printed
from half a record. `schema` says the same as JSON Schema (docs/audit.schema.json).

What this file does not do: draw the page (`page.py`).
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from audit.evidence import Evidence
from audit.findings import ORDER, CanaryBounds, Finding, Picture, Pooled, Verdict, worst
from audit.policy import Decision, Policy
from audit.record.artefacts import Artefact, Audited
from audit.statistics.intervals import ONE_SIDE
from forms.form import build, hints
from forms.json_text import read_json

_LONGEST = 50_000_000
Epsilon = Literal["infinite"] | float


@dataclass(frozen=True, kw_only=True)
class FindingRow:
    """A finding; see `audit/findings.py`."""

    artefact: str
    attack: str
    measure: str
    n_in: int
    n_out: int
    verdict: Verdict
    sentence: str
    value: float | None
    low: float | None
    high: float | None
    ceiling: float | None
    baseline: float | None
    true_positive_rate: float | None
    epsilon_low: float | None
    roc: tuple[tuple[float, float], ...]
    worst_group: str
    worst_value: float | None
    pictures: tuple[Picture, ...]
    pooled: Pooled | None
    canaries: CanaryBounds | None
    seconds: float


def worst_of(findings: Sequence[FindingRow]) -> FindingRow:
    """The first with the worst verdict; of none, `ValueError`."""
    return min(findings, key=lambda finding: ORDER.index(finding.verdict))


@dataclass(frozen=True, kw_only=True)
class ArtefactRow:
    """One thing that left, or was published."""

    name: str
    releases: int
    sha256: tuple[str, ...]
    epsilon: Epsilon
    """Upper bound, charged in the ledger."""
    delta: Epsilon
    epsilon_low: float | None
    """Lower bound, shown by an attack (95%)."""
    largest_rate_1: float
    """Share of members that any attacker could find at one false alarm in a hundred."""
    largest_rate_01: float
    """The same at one in a thousand."""
    reached_rate_1: float | None
    """What ours found."""
    verdict: Verdict
    findings: tuple[FindingRow, ...]


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """The audit of the audit: claims about nobody's membership."""

    claimed: int
    tried: int
    low: float
    high: float
    nominal: float


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Faults that were built in on purpose, and sound pieces beside them."""

    faults: int
    found: int
    sound: int
    accused: int
    missed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """An audit."""

    version: Literal["FedMeDUET audit, version 1"]
    run: str
    plan_sha256: str
    audited_utc: str
    command: str
    versions: dict[str, str]
    hashes: dict[str, str]
    """sha256 of every file that was read."""
    policy: dict[str, Any]
    status: int
    """0 within the policy, 1 not, 2 undecided."""
    unfinished: str
    failed: tuple[str, ...]
    undecided: tuple[str, ...]
    artefacts: tuple[ArtefactRow, ...]
    alarms: Alarms
    planted: Planted | None
    not_tested: tuple[str, ...]
    seconds: float


UNLESS = {
    "canaries": "Where noise was promised, it was not tested with canaries (audit_canaries in a plan).",
    "shadow": "Attackers who train models in the run's place (--shadow) may do better than a loss.",
    "inversion": "Scans behind a single gradient (gradient inversion; not with --quick) were not looked for.",
}
"""What is said where a test did not run."""
NOT_TESTED = (
    "Images were not looked at for faces, implants or text burned into them.",
    "Programs, keys, networks and people: who can read a file, or rewrite one.",
    "Patients who are at two hospitals: what is charged adds up for them, and nobody knows who they are.",
    "Attackers who know more than a candidate's scan: an earlier scan of the same kind is the least they "
    "hold here.",
)
"""What no run of this command tries, whatever its settings."""


def record_of(
    evidence: Evidence,
    audited: Audited,
    policy: Policy,
    decision: Decision,
    planted: Planted | None,
    about: Mapping[str, Any],
) -> Record:
    """Everything of an audit; `about` says when, by which command, with which versions, in how long."""
    low, high = audited.alarm_interval
    ran = {finding.attack for finding in audited.findings}
    return Record(
        version="FedMeDUET audit, version 1",
        run=evidence.name,
        plan_sha256=evidence.plan.sha256,
        hashes=dict(evidence.hashes),
        policy=dataclasses.asdict(policy),
        status=decision.status,
        unfinished=evidence.unfinished,
        failed=tuple(decision.failed),
        undecided=tuple(decision.undecided),
        artefacts=tuple(_row(artefact) for artefact in audited.artefacts),
        alarms=Alarms(claimed=audited.alarms, tried=audited.tried, low=low, high=high, nominal=ONE_SIDE),
        planted=planted,
        not_tested=(*(said for test, said in UNLESS.items() if test not in ran), *NOT_TESTED),
        **about,
    )


def to_json(record: Record) -> str:
    """As the file holds it."""
    return json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"


def read_record(path: Path) -> Record:
    """A record from its file. Raises `ValueError` for anything that is not one, whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"Expected the record of an audit in {path.name}; {error.strerror}.") from None
    values = read_json(text, "the record of an audit", longest=_LONGEST)
    if not isinstance(values, dict):
        raise ValueError("Expected the record of an audit; got another JSON value.")
    policy = values.pop("policy", None)
    record = build(Record, {**values, "policy": {}}, "audit")
    return dataclasses.replace(record, policy=dataclasses.asdict(build(Policy, policy, "audit.policy")))


def schema() -> dict[str, Any]:
    """JSON Schema of a record."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "audit.json", **_of(Record)}


def _row(artefact: Artefact) -> ArtefactRow:
    return ArtefactRow(
        name=artefact.name,
        releases=artefact.releases,
        sha256=artefact.sha256,
        epsilon=_finite(artefact.epsilon),
        delta=_finite(artefact.delta),
        epsilon_low=artefact.epsilon_low,
        largest_rate_1=artefact.largest_rate(0.01),
        largest_rate_01=artefact.largest_rate(0.001),
        reached_rate_1=artefact.reached,
        verdict=worst(list(artefact.findings)),
        findings=tuple(_finding(one) for one in artefact.findings),
    )


def _finding(finding: Finding) -> FindingRow:
    values = {field.name: getattr(finding, field.name) for field in dataclasses.fields(finding)}
    return FindingRow(**{name: _number(value) for name, value in values.items()})


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: float) -> Epsilon:
    return "infinite" if math.isinf(value) else value  # JSON has no infinity


def _of(kind: Any) -> dict[str, Any]:
    """The schema of a type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = {name: _of(hint) for name, hint in hints(kind).items()}
        return {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
    if origin is Annotated:
        return _of(arguments[0])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_of(one) for one in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0])}
    if origin is dict:
        inner = {} if arguments[1] is Any else _of(arguments[1])
        return {"type": "object", "additionalProperties": inner or True}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return {"type": names[kind]}
