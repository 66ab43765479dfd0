"""The site's books held against each other: a backup put back shows where one knows more than another.

Ledger, journal and the states of training are written in a known order: a place in the ledger, the charge,
the line of the journal, the state. So a charge that the journal names, or a round that a state has seen, must
be in the ledger. Where it is not, the ledger is older than what was done, or lines were cut off its end: the
chains alone cannot tell (`privacy/chain.py`). A ledger that is gone is one that is older than everything:
losing what was spent never means beginning at nothing in silence. Whoever lost all of `state_dir` has lost
the approvals, too, and answers nothing until the hospital's people approve again.

Does not do: notice that all of them were put back together; that shows against a hash kept elsewhere, or
the centre's journal.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from federation.journal import Journal, read_journal
from privacy.chain import BrokenChain, Chain, Entry, read_chain

LEDGER, JOURNAL, APPROVALS = "ledger.jsonl", "journal.jsonl", "approvals.jsonl"
_DONE = ("state", "diffusion", "answers")
_STATE = re.compile(r"[a-z_]+-(\d+)(-\w+)?\.safetensors")
_ADVICE = (
    "Was an older backup put back? Put back the newest copy of state_dir, and keep these files as evidence."
)


@dataclass(frozen=True)
class Books:
    """What was found in a site's books, all of them whole and none older than another can tell."""

    ledger: Sequence[Entry]
    """Lines of the ledger."""
    journal: Sequence[Entry]
    """Lines of the journal."""
    unnamed: int
    """Charges that no line of the journal names: a site that was killed just then leaves one; more mean that
    the journal is older than the ledger."""


def open_books(state_dir: Path) -> Books:
    """The books of a site that is about to write them: a last line that a crash left torn is repaired.

    Raises `BrokenChain`.
    """
    journal = Journal(state_dir / JOURNAL).entries()  # before the ledger: a charge comes before its line
    return _held_together(state_dir, Chain(state_dir / LEDGER, "ledger").entries(), journal)


def read_books(state_dir: Path, head: str = "") -> Books:
    """The same for people, approvals too; nothing is written. `head`: hash of a line of the journal that must
    be there.

    Raises `BrokenChain`, and `ValueError` when ledger or journal is not there.
    """
    journal = read_journal(state_dir / JOURNAL, head)
    books = _held_together(state_dir, read_chain(state_dir / LEDGER, "ledger"), journal)
    if (state_dir / APPROVALS).exists():
        read_chain(state_dir / APPROVALS, "approvals")
    return books


def _held_together(state_dir: Path, ledger: Sequence[Entry], journal: Sequence[Entry]) -> Books:
    lines = {entry.sha256 for entry in ledger}
    named = {entry.record["ledger"]: entry.index + 1 for entry in journal if "ledger" in entry.record}
    path = state_dir / LEDGER
    for sha256, line in named.items():
        if sha256 not in lines:
            raise BrokenChain(
                f"{path}: expected the charge that journal line {line} names; it is not there. {_ADVICE}"
            )
    places = {
        (e.record["plan"][:12], e.record["round"]) for e in ledger if e.record.get("event") == "reserve"
    }
    for plan, round_number in _rounds_done(state_dir):
        if (plan, round_number) not in places:
            raise BrokenChain(
                f"{path}: expected the place of round {round_number} of plan {plan}…, which was done here; "
                f"it is not there. {_ADVICE}"
            )
    charged = {entry.sha256 for entry in ledger if entry.record.get("event") in ("settle", "anew")}
    return Books(ledger, journal, len(charged - named.keys()))


def _rounds_done(state_dir: Path) -> list[tuple[str, int]]:
    """Plan (12 digits) and round of each state and answer that was kept; the common start is none."""
    found = []
    for path in sorted(file for folder in _DONE for file in (state_dir / folder).glob("*/*-*")):
        match = _STATE.fullmatch(path.name)
        if match and int(match[1]):
            found.append((path.parent.name, int(match[1])))
    return found
