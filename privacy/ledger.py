"""The ledger: what a site's patients have been charged, written before anything is read.

Two lines per release: `reserve` before the first scan is opened, and `settle` when the release leaves. A
reservation without a settlement stays visible. What is asked has a place (plan, kind, round, part) and a hash
of its own. One answer leaves for each place, to one question: the same question has the same answer and is
charged once, another question for a place that was answered is refused. Sums that answer several questions
about the same patients are equations, and enough of them have one solution. A site that lost both what left
and what it was made from cannot give the same bytes again: for its newest place, and once, another answer to
the same question leaves, in a line of its own (`anew`); not under noise, which would be drawn twice.

A release with noise is written with its mechanism, one without makes the total infinite. Before a place is
held, all that was reserved and this are added up (`privacy/accounting.py`) and compared with the site's own
ceiling; a reservation counts in full, whether its answer left or not, until the site's people say that
nothing left (`close`). So whatever is killed when, the sum is at least what left. It is append-only and
hash-chained (`privacy/chain.py`).

Does not do: know which patient was in which cohort. Whoever was at the site is charged for everything.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.accounting import LARGEST_DELTA, Epsilon, Mechanism, epsilon_of, is_within
from privacy.chain import Chain, Entry
from privacy.promise import Promise


class LedgerRefusal(ValueError):
    """The site's ceiling does not allow what the plan asks for; nothing was read."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most that a site's patients may be charged, over all plans."""

    epsilon: float = math.inf
    """Infinity: no ceiling. Any other number refuses whatever is not noised."""
    delta: float = LARGEST_DELTA
    """At which epsilon is added up."""

    def __post_init__(self) -> None:
        """Refuse a ceiling that is none."""
        if not self.epsilon >= 0:
            raise ValueError(f"Expected epsilon_ceiling >= 0; got {self.epsilon}.")
        if not 0 < self.delta <= LARGEST_DELTA:
            raise ValueError(f"Expected delta_ceiling in (0, {LARGEST_DELTA:g}]; got {self.delta}.")


@dataclass(frozen=True)
class Spent:
    """What a ledger says of its patients."""

    total: Epsilon
    """Everything together."""
    noised: Epsilon
    """The releases with noise alone, for where the total is infinite."""
    num_plain: int
    """Releases without noise, reserved or left."""
    num_noised: int
    """Releases with noise, reserved or left."""


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


NO_CEILING = Ceiling()


class Ledger:
    """The ledger file of one site; it holds no more than `ceiling`."""

    def __init__(self, path: Path, ceiling: Ceiling = NO_CEILING) -> None:
        self._chain = Chain(path, purpose="ledger")
        self._ceiling = ceiling

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
        mechanism = promise.mechanism
        record = {
            "event": "reserve",
            **place.record(),
            "question": question,
            "promise": promise.sentence(),
            "epsilon": _word(promise.epsilon.upper),
            **({} if mechanism is None else {"delta": promise.delta, "mechanism": mechanism.record()}),
        }
        held: list[str] = []

        def decide(entries: Sequence[Entry]) -> Mapping[str, Any] | None:
            if _given_away(entries, place, question):
                raise AnsweredBefore(
                    f"Expected the question that was answered for {place}; got another. Nothing was read."
                )
            closed = _closed(entries)
            held.extend(e.sha256 for e in entries if e.record == record and e.sha256 not in closed)
            if not held:
                self._check(entries, place, promise)
            return None if held else record

        entry = self._chain.extend(decide) or held[0]
        return Reservation(place, question, promise, entry)

    def _check(self, entries: Sequence[Entry], place: Place, promise: Promise) -> None:
        """Raise `LedgerRefusal` unless everything and this is within the ceiling."""
        ceiling = self._ceiling
        if math.isinf(ceiling.epsilon) or promise.enforcement == "none":  # of no patient
            return
        asks = f"Plan {place.plan_sha256[:8]}… releases '{promise.kind}'"
        if promise.mechanism is None:
            raise LedgerRefusal(
                f"{asks} without noise, at epsilon infinity; this site's ceiling is {ceiling.epsilon:g} "
                "(site.yaml: allow_non_private, epsilon_ceiling). Nothing was read."
            )
        before = _charged(entries)
        noised = [*(one for one in before if one is not None), promise.mechanism]
        if None in before or not is_within(noised, ceiling.epsilon, ceiling.delta):
            total = epsilon_of([*before, promise.mechanism], ceiling.delta).upper
            alone = epsilon_of([promise.mechanism], ceiling.delta).upper
            raise LedgerRefusal(
                f"{asks} at epsilon {alone:.4g} (delta {ceiling.delta:g}); with what was reserved before "
                f"that makes {total:.4g}, and this site's ceiling is {ceiling.epsilon:g} (site.yaml: "
                "epsilon_ceiling; meduet-site ledger show). Nothing was read."
            )

    def spent(self) -> Spent:
        """What this site's patients are charged: all that was reserved and not closed, at the ceiling's
        delta."""
        return spent_of(self._chain.entries(), self._ceiling.delta)

    def close(self, index: int, reason: str) -> None:
        """Charge the reservation in line `index` no longer: the site's people say, with a reason, that
        nothing left.

        No answer leaves under it any more. Raises `ValueError` when that line is no reservation, its answer
        left, or it was closed before.
        """
        if not reason.strip():
            raise ValueError("Expected a reason why nothing left; got none. Nothing was closed.")

        def decide(entries: Sequence[Entry]) -> Mapping[str, Any]:
            if not 0 <= index < len(entries) or entries[index].record.get("event") != "reserve":
                raise ValueError(f"Expected the index of a reservation; line {index} is none.")
            entry = entries[index].sha256
            if _settled(entries, entry) is not None:
                raise ValueError(f"Expected a reservation whose answer did not leave; that of {index} left.")
            if entry in _closed(entries):
                raise ValueError(f"Expected an open reservation; {index} was closed before.")
            return {"event": "close", "reservation": entry, "reason": reason.strip()}

        self._chain.extend(decide)

    def open_reservations(self) -> list[Entry]:
        """Reservations whose answer did not leave, and which nobody closed."""
        return open_of(self._chain.entries())

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
        promise = reservation.promise
        anew = anew and promise.mechanism is None
        record = {
            "event": "settle",
            "reservation": reservation.entry,
            "charge": _charge(promise),
            "epsilon": _word(promise.epsilon.upper),
            **({} if promise.delta is None else {"delta": promise.delta}),
            "bound": promise.bound,
            "weight": weight,
            "released": released_sha256,
        }
        known: list[Settled] = []

        def decide(entries: Sequence[Entry]) -> Mapping[str, Any] | None:
            if reservation.entry not in {e.sha256 for e in entries if e.record.get("event") == "reserve"}:
                raise ValueError(
                    "Expected a reservation of this ledger; reserve before reading. Nothing is released."
                )
            if reservation.entry in _closed(entries):
                raise AnsweredBefore(
                    f"Expected an open reservation for {reservation.place}; this site closed it. Nothing is "
                    "released."
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


def _closed(entries: Sequence[Entry]) -> set[str]:
    """Reservations of which the site's people said that nothing left."""
    return {_text(e.record, "reservation") for e in entries if e.record.get("event") == "close"}


def held(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The reservations that count: of something of a patient, and not closed."""
    closed = _closed(entries)
    return [
        e.record
        for e in entries
        if e.record.get("event") == "reserve" and e.sha256 not in closed and e.record.get("epsilon") != 0
    ]


def spent_of(entries: Sequence[Entry], delta: float) -> Spent:
    """What these lines of a ledger charge its patients, at `delta`."""
    charged = _charged(entries)
    noised = [mechanism for mechanism in charged if mechanism is not None]
    return Spent(
        total=epsilon_of(charged, delta),
        noised=epsilon_of(noised, delta),
        num_plain=len(charged) - len(noised),
        num_noised=len(noised),
    )


def open_of(entries: Sequence[Entry]) -> list[Entry]:
    """Reservations among these lines whose answer did not leave, and which nobody closed."""
    done = _closed(entries) | {e.record.get("reservation") for e in entries}
    return [e for e in entries if e.record.get("event") == "reserve" and e.sha256 not in done]


def _charged(entries: Sequence[Entry]) -> list[Mechanism | None]:
    """What each reservation that counts costs; None: without noise."""
    return [Mechanism.from_record(r["mechanism"]) if "mechanism" in r else None for r in held(entries)]


def _charge(promise: Promise) -> str:
    if promise.enforcement == "none":
        return "Nothing"
    return "NonPrivate" if promise.mechanism is None else "Gaussian"


def _word(epsilon: float) -> str | float:
    return "inf" if math.isinf(epsilon) else epsilon  # JSON has no infinity


def _text(record: dict[str, Any], name: str) -> str:
    return str(record[name])
