"""The ledger: what a site's patients have been charged, written before anything is read.

Two lines per release: `reserve` before the first scan is opened, and `settle` when the release leaves. A
reservation without a settlement stays visible. What is asked has a place (plan, kind, round, part) and a hash
of its own. One answer leaves for each place, to one question: the same question has the same answer and is
charged once, another question for a place that was answered is refused. Sums that answer several questions
about the same patients are equations, and enough of them have one solution. A site that lost both what left
and what it was made from cannot give the same bytes again: for its newest place, and once, another answer to
the same question leaves, in a line of its own (`anew`). That is no second charge while epsilon is infinite;
under noise it would be one. The ledger may also refuse by the site's own ceiling. It is append-only and
hash-chained (`privacy/chain.py`).

Does not do: accounting of noise. In this version nothing is noised, so each settled release is an event with
epsilon infinity (`NonPrivate`), and a site whose ceiling is finite takes part in no plan.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.chain import Chain, Entry
from privacy.promise import Promise


class LedgerRefusal(ValueError):
    """The site's ceiling does not allow what the plan asks for; nothing was read."""


class AnsweredBefore(ValueError):
    """The place that is asked for was given to another question, or its answer was another."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one answer may leave, once."""

    plan_sha256: str
    """Which plan; a fine-tuning is a plan of its own."""
    kind: str
    """What is released."""
    round: int
    """Which round; 0 for what comes before the first."""
    part: str = ""
    """Which part, where an answer comes in parts: letters, digits and underscores."""

    def record(self) -> dict[str, Any]:
        """As it stands in the books."""
        part = {"part": self.part} if self.part else {}
        return {"plan": self.plan_sha256, "kind": self.kind, "round": self.round, **part}

    def __str__(self) -> str:
        """For people."""
        part = f" ({self.part})" if self.part else ""
        return f"'{self.kind}' of round {self.round}{part} of plan {self.plan_sha256[:8]}…"


@dataclass(frozen=True)
class Reservation:
    """A place in the ledger, held for a question before any scan is read; the gate wants to see it."""

    place: Place
    """Which answer."""
    question: str
    """Hash of everything that was asked."""
    promise: Promise
    """Under which promise."""
    entry: str
    """Hash of the ledger's line."""


@dataclass(frozen=True)
class Settled:
    """A release that left."""

    entry: str
    """Hash of the ledger's line."""
    released: str
    """Hash of its tensors."""


class Ledger:
    """The ledger file of one site.

    `epsilon_ceiling`: the most that this site's patients may be charged, None for no ceiling. As releases are
    not noised in this version, any finite ceiling refuses.
    """

    def __init__(self, path: Path, epsilon_ceiling: float | None = None) -> None:
        if epsilon_ceiling is not None and not epsilon_ceiling >= 0:
            raise ValueError(f"Expected epsilon_ceiling >= 0 or none; got {epsilon_ceiling}.")
        self._chain = Chain(path, purpose="ledger")
        self._ceiling = math.inf if epsilon_ceiling is None else epsilon_ceiling

    @property
    def head(self) -> str:
        """Hash of the last line."""
        return self._chain.head

    def reserve(self, place: Place, question: str, promise: Promise) -> Reservation:
        """Hold a place for the answer to a question (its hash), before any scan is read.

        Reserving the same again, as when a message is delivered twice, returns the first reservation and
        writes nothing. A place whose first question got no answer may be held for another. Raises
        `AnsweredBefore` when the place was given to another question, and `LedgerRefusal` when the ceiling
        does not allow the promise.
        """
        assert promise.kind == place.kind, "a place is held for what the promise is about"
        if promise.epsilon > self._ceiling:
            raise LedgerRefusal(
                f"Plan {place.plan_sha256[:8]}… releases '{promise.kind}' at epsilon {promise.epsilon:g}; "
                f"this site's ceiling is {self._ceiling:g} (site.yaml: allow_non_private). Nothing was read."
            )
        record = {
            "event": "reserve",
            **place.record(),
            "question": question,
            "promise": promise.sentence(),
            "epsilon": _word(promise.epsilon),
        }
        held: list[str] = []

        def decide(entries: Sequence[Entry]) -> Mapping[str, Any] | None:
            if _given_away(entries, place, question):
                raise AnsweredBefore(
                    f"Expected the question that was answered for {place}; got another. Nothing was read."
                )
            held.extend(entry.sha256 for entry in entries if entry.record == record)
            return None if held else record

        entry = self._chain.extend(decide) or held[0]
        return Reservation(place, question, promise, entry)

    def settled(self, reservation: Reservation) -> Settled | None:
        """What left under this reservation; None before."""
        return _settled(self._chain.entries(), reservation.entry)

    def settle(
        self, reservation: Reservation, weight: float, released_sha256: str, anew: bool = False
    ) -> str:
        """Charge a release that is about to leave; returns the hash of the line.

        The very same bytes (a message delivered twice) are charged once. `anew` says that the site has lost
        what left, and the state after it: other bytes are then noted for the newest place that was answered,
        once. Raises `AnsweredBefore` for other bytes, or when the place was given to another question
        meanwhile, and `ValueError` if the reservation is not in this ledger.
        """
        record = {
            "event": "settle",
            "reservation": reservation.entry,
            "charge": "NonPrivate" if reservation.promise.epsilon else "Nothing",
            "epsilon": _word(reservation.promise.epsilon),
            "bound": reservation.promise.bound,
            "weight": weight,
            "released": released_sha256,
        }
        known: list[Settled] = []

        def decide(entries: Sequence[Entry]) -> Mapping[str, Any] | None:
            if reservation.entry not in {e.sha256 for e in entries if e.record.get("event") == "reserve"}:
                raise ValueError(
                    "Expected a reservation of this ledger; reserve before reading. Nothing is released."
                )
            before = _settled(entries, reservation.entry)
            other = before is not None and before.released != released_sha256
            if _given_away(entries, reservation.place, reservation.question) or (
                other and not (anew and _may_be_answered_anew(entries, reservation))
            ):
                raise AnsweredBefore(
                    f"Expected the answer that left before for {reservation.place}; this one is another "
                    "(other scans, another machine?). Nothing is released."
                )
            if other:
                said = ("reservation", "bound", "weight", "released")
                return {"event": "anew", **{name: record[name] for name in said}}
            known.extend([before] if before is not None else [])
            return None if known else record

        return self._chain.extend(decide) or known[0].entry

    def verify(self, head: str | None = None) -> int:
        """Check the chain and return the number of its lines; raises `BrokenChain` naming the line."""
        return self._chain.verify(head)


def _given_away(entries: Sequence[Entry], place: Place, question: str) -> bool:
    """Whether an answer to another question left for this place."""
    others = {
        entry.sha256
        for entry in entries
        if entry.record.get("event") == "reserve"
        and entry.record.items() >= place.record().items()
        and entry.record.get("part", "") == place.part
        and entry.record.get("question") != question
    }
    return any(entry.record.get("reservation") in others for entry in entries)


def _may_be_answered_anew(entries: Sequence[Entry], reservation: Reservation) -> bool:
    """Whether no later round of the kind was answered, and this place never anew."""
    place = reservation.place
    events = [e.record for e in entries if e.record.get("reservation") == reservation.entry]
    left = {e.record.get("reservation") for e in entries}
    later = any(
        entry.record["round"] > place.round
        for entry in entries
        if entry.sha256 in left
        and (entry.record["plan"], entry.record["kind"]) == (place.plan_sha256, place.kind)
    )
    return not later and all(event["event"] != "anew" for event in events)


def _settled(entries: Sequence[Entry], reservation: str) -> Settled | None:
    """What left last under this reservation."""
    for entry in reversed(entries):
        if entry.record.get("event") in ("settle", "anew") and entry.record["reservation"] == reservation:
            return Settled(entry.sha256, _text(entry.record, "released"))
    return None


def _word(epsilon: float) -> str | float:
    return "inf" if math.isinf(epsilon) else epsilon  # JSON has no infinity


def _text(record: dict[str, Any], name: str) -> str:
    return str(record[name])
