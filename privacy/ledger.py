"""The ledger: what a site's patients have been charged, written before anything is read.

Two lines per release: `reserve` before the first scan is opened, and `settle` when the release leaves. A
reservation without a settlement stays visible. The ledger may refuse, by the site's own ceiling. It is
append-only and hash-chained (`privacy/chain.py`).

Does not do: accounting of noise. In this version nothing is noised, so each settled release is an event with
epsilon infinity (`NonPrivate`), and a site whose ceiling is finite takes part in no plan.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.chain import Chain
from privacy.promise import Promise


class LedgerRefusal(ValueError):
    """The site's ceiling does not allow what the plan asks for; nothing was read."""


@dataclass(frozen=True)
class Reservation:
    """A place in the ledger, held before any scan is read; the gate wants to see it."""

    plan_sha256: str
    """Which plan."""
    round: int
    """Which round; 0 for what happens outside rounds."""
    promise: Promise
    """Under which promise."""
    entry: str
    """Hash of the ledger's line."""


@dataclass(frozen=True)
class Open:
    """A reservation that was never settled: reading may have begun, nothing left."""

    plan_sha256: str
    """Which plan."""
    round: int
    """Which round."""
    kind: str
    """What was going to be released."""


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

    def reserve(self, plan_sha256: str, round: int, promise: Promise) -> Reservation:
        """Hold a place for a release, before any scan is read.

        Reserving the same (plan, round, kind) again, as when a message is delivered twice, returns the first
        reservation and writes nothing. Raises `LedgerRefusal` when the ceiling does not allow the promise.
        """
        if promise.epsilon > self._ceiling:
            raise LedgerRefusal(
                f"Plan {plan_sha256[:8]}… releases '{promise.kind}' at epsilon {promise.epsilon:g}; this "
                f"site's ceiling is {self._ceiling:g} (site.yaml: allow_non_private). Nothing was read."
            )
        record = {
            "event": "reserve",
            "plan": plan_sha256,
            "round": round,
            "kind": promise.kind,
            "promise": promise.sentence(),
            "epsilon": _word(promise.epsilon),
        }
        for entry in self._chain.entries():
            if entry.record == record:
                return Reservation(plan_sha256, round, promise, entry.sha256)
        return Reservation(plan_sha256, round, promise, self._chain.append(record))

    def settle(self, reservation: Reservation, weight: float, released_sha256: str) -> str:
        """Charge a release that is about to leave; returns the hash of the line.

        The very same bytes (a message delivered twice) are charged once; other bytes under the same
        reservation are another release and another line. Raises `ValueError` if the reservation is not in
        this ledger.
        """
        entries = self._chain.entries()
        if reservation.entry not in {e.sha256 for e in entries if e.record.get("event") == "reserve"}:
            raise ValueError(
                "Expected a reservation of this ledger; reserve before reading. Nothing is released."
            )
        record = {
            "event": "settle",
            "reservation": reservation.entry,
            "charge": "NonPrivate",
            "epsilon": _word(reservation.promise.epsilon),
            "bound": reservation.promise.bound,
            "weight": weight,
            "released": released_sha256,
        }
        for entry in entries:
            if entry.record == record:
                return entry.sha256
        return self._chain.append(record)

    def open_reservations(self) -> list[Open]:
        """Reservations without a settlement, oldest first."""
        entries = self._chain.entries()
        settled = {_text(e.record, "reservation") for e in entries if e.record.get("event") == "settle"}
        return [
            Open(_text(e.record, "plan"), int(e.record["round"]), _text(e.record, "kind"))
            for e in entries
            if e.record.get("event") == "reserve" and e.sha256 not in settled
        ]

    def epsilon_spent(self) -> float:
        """What has been charged so far: 0 before the first release, infinity after it."""
        return math.inf if any(e.record.get("event") == "settle" for e in self._chain.entries()) else 0.0

    def verify(self, head: str | None = None) -> int:
        """Check the chain and return the number of its lines; raises `BrokenChain` naming the line."""
        return self._chain.verify(head)


def _word(epsilon: float) -> str | float:
    return "inf" if math.isinf(epsilon) else epsilon  # JSON has no infinity


def _text(record: dict[str, Any], name: str) -> str:
    return str(record[name])
