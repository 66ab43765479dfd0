"""The books of a site: is everything that left written down, reserved first, charged once, under its ceiling?

Journal and ledger are hash chains (`privacy/chain.py`): an edited, moved or removed line shows, and lines cut
off the end show against each other, since each line of the journal names its charge.

What this file does not do: correct anything.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from audit.evidence import SiteBooks
from federation.journal import BrokenChain, read_journal
from privacy.accounting import LARGEST_DELTA, Mechanism, epsilon_of
from privacy.chain import Entry, read_chain
from privacy.ledger import Ceiling, held


@dataclass(frozen=True)
class Charged:
    """What the ledger says was spent."""

    epsilon: float
    """Of all together; infinite where a release had no noise."""
    delta: float
    """At which it is told."""


@dataclass(frozen=True)
class Read:
    """Books that were read."""

    problems: list[str] = field(default_factory=list)
    """What does not hold, each in a sentence."""
    released: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the journal under which something left."""
    charged: dict[str, Charged] = field(default_factory=dict)
    """By kind."""
    total: Charged = field(default_factory=lambda: Charged(0.0, 0.0))
    """Of all kinds together: less than the sum."""
    questions: dict[str, int] = field(default_factory=dict)
    """Most questions that were answered for one place, by kind."""


def read_books(books: SiteBooks) -> Read:
    """Read and hold against each other; a book that is broken or not there is a problem, and ends it."""
    try:
        journal, ledger = read_journal(books.journal), read_chain(books.ledger, "ledger")
    except BrokenChain as error:
        return Read([_without_path(error)])
    except ValueError:
        missing = [p.name for p in (books.journal, books.ledger) if not p.is_file()]
        return Read([f"There is no {' and no '.join(missing)}: what was promised cannot be checked."])
    released = [e.record for e in journal if "sha256" in e.record]
    problems = [
        *_uncharged(released, ledger),
        *_unreserved(ledger),
        *_over(ledger, books.ceiling),
        *_changed(released),
    ]
    questions = _questions(released)
    problems += [
        f"{most} different questions were answered for one place of kind '{kind}': their answers are "
        "equations about the same patients."
        for kind, most in questions.items()
        if most > 1
    ]
    left = {e.record.get("reservation") for e in ledger if e.record.get("event") in ("settle", "anew")}
    kinds = dict.fromkeys(str(e.record["kind"]) for e in ledger if e.sha256 in left)
    charged = {kind: _charged(ledger, {kind}) for kind in kinds}
    return Read(problems, released, charged, _charged(ledger), questions)


def _uncharged(released: Sequence[dict[str, Any]], ledger: Sequence[Entry]) -> Iterator[str]:
    """Lines of the journal whose charge is not in the ledger, or is that of something else."""
    entries = {entry.sha256: entry.record for entry in ledger}
    for line in released:
        what = f"'{line['kind']}' of round {line.get('round', 0)}"
        charge = entries.get(str(line.get("ledger")))
        if charge is None or charge.get("event") not in ("settle", "anew"):
            yield f"{what} left, and the ledger does not know of it: a charge was forgotten, or cut off."
            continue
        reservation = entries.get(str(charge.get("reservation")), {})
        place = {name: line.get(name) for name in ("plan", "kind", "round", "question")}
        if {name: reservation.get(name) for name in place} != place:
            yield f"{what} left on the charge of another question."
        elif charge.get("released") != line["sha256"]:
            yield f"{what} left with other bytes than were charged."


def _unreserved(ledger: Sequence[Entry]) -> Iterator[str]:
    """Settlements without an earlier reservation, or at another epsilon than was reserved."""
    reserved: dict[str, Any] = {}
    for entry in ledger:
        if entry.record.get("event") == "reserve":
            reserved[entry.sha256] = entry.record
        elif entry.record.get("event") == "settle":
            kept = reserved.get(str(entry.record.get("reservation")))
            if kept is None:
                yield f"Line {entry.index + 1} of the ledger settles what was never reserved."
            elif number(kept.get("epsilon")) != number(entry.record.get("epsilon")):
                yield f"Line {entry.index + 1} of the ledger charges another epsilon than was reserved."


def _over(ledger: Sequence[Entry], ceiling: Ceiling | None) -> Iterator[str]:
    """What was reserved beyond the ceiling, before anything was closed."""
    if ceiling is None or math.isinf(ceiling.epsilon):
        return
    for count, entry in enumerate(ledger, start=1):
        if entry.record.get("event") == "reserve" and _charged(ledger[:count]).epsilon > ceiling.epsilon:
            yield f"Line {count} of the ledger passes the site's ceiling of {ceiling.epsilon:g}."
            return


def _changed(released: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One question, two answers."""
    seen: dict[tuple[Any, ...], str] = {}
    for line in released:
        place = (*(line.get(name) for name in ("plan", "kind", "round", "part", "question")),)
        if seen.setdefault(place, line["sha256"]) != line["sha256"]:
            what = f"'{line['kind']}' of round {line.get('round', 0)}"
            yield f"{what} left twice for one question, differently."


def _questions(released: Sequence[dict[str, Any]]) -> dict[str, int]:
    asked: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for line in released:
        place = (line["kind"], line.get("plan"), line.get("round"), line.get("part", ""))
        asked[place].add(str(line.get("question")))
    most: dict[str, int] = {}
    for (kind, *_), questions in asked.items():
        most[kind] = max(most.get(kind, 0), len(questions))
    return most


def _charged(ledger: Sequence[Entry], kinds: set[str] | None = None) -> Charged:
    """What all that was reserved and not closed costs together, of some kinds or of all: with noise by its
    mechanisms, without it infinite; random numbers alone are charged nothing."""
    spent = [record for record in held(ledger) if kinds is None or record.get("kind") in kinds]
    charges = [Mechanism.from_record(r["mechanism"]) if "mechanism" in r else None for r in spent]
    if not all(charges):  # a ledger of another version says a number beside each
        plain = [number(r.get("epsilon")) for r in spent if "mechanism" not in r]
        noised = epsilon_of([one for one in charges if one is not None], LARGEST_DELTA).upper
        return Charged(sum(plain) + noised, LARGEST_DELTA)
    return Charged(epsilon_of(charges, LARGEST_DELTA).upper, LARGEST_DELTA if charges else 0.0)


def number(value: Any) -> float:
    """An epsilon or delta as the ledger writes it; infinite where it says so, or says nothing."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    return math.inf


def _without_path(error: Exception) -> str:
    return str(error).rpartition("/")[2]
