"""Refusals: a site's no is a release, too, and stands in its books.

Whether a question is answered may depend on a patient: weights can be made so that a number overflows only
where a latent is larger than the centre guesses, and twenty such questions read it. So every refusal is a
line of the journal with the hash of the question. Kinds that weights can bring about leave as one word
(`not_answered`), whatever the site's log says of them. After `MOST` questions of a plan that ended so, and
were never answered, the site stops: it says `stopped` and nothing else under that plan, until its own people
have read the log and say `meduet-site plan resume`.

Does not do: decide what is refused (`client/exchanges/`), send it (`client/app.py`).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from federation.journal import Journal
from federation.wire.wire import RefusalKind
from privacy.chain import Entry

MOST = 3
"""Questions of a plan that may end in `not_answered`."""
_PROVOKED = frozenset(
    {RefusalKind.NON_FINITE, RefusalKind.DEADLINE, RefusalKind.OUT_OF_MEMORY, RefusalKind.INTERNAL}
)
_PROVOKED_BY_WEIGHTS = _PROVOKED | {RefusalKind.MALFORMED}
"""Once a place is held, scans may have been read: then a fault of the weights is not told apart either."""
_log = logging.getLogger(__name__)


def told_as(kind: RefusalKind, reserved: bool) -> RefusalKind:
    """The word that leaves; `reserved`: a place in the ledger was held for the question."""
    return RefusalKind.NOT_ANSWERED if kind in (_PROVOKED_BY_WEIGHTS if reserved else _PROVOKED) else kind


def note_refusal(journal: Journal, asked: Mapping[str, Any], kind: RefusalKind) -> RefusalKind:
    """Write a refusal down; the word that leaves.

    `asked` is what is known of the question: its route, plan, place and hash, and `reserved`, the ledger's
    line, once there is one. Raises what the journal raises; then nothing must leave but
    `not_answered`.
    """
    said = told_as(kind, "reserved" in asked)
    plan = asked.get("plan", "")
    before = is_stopped(journal.entries(), plan)
    journal.append({**asked, "of": asked.get("kind", ""), "kind": "refusal", "reason": kind, "told": said})
    if not before and is_stopped(journal.entries(), plan):
        _log.error(
            "%d questions of plan %s… could not be answered; nothing more is answered under it. Read above "
            "why; when it is mended: meduet-site plan resume %s.",
            MOST,
            plan[:12],
            plan[:12],
        )
    return said


def is_stopped(entries: Sequence[Entry], plan_sha256: str) -> bool:
    """Whether too many questions of a plan could not be answered, by the lines of the journal."""
    return len(unanswered(entries, plan_sha256)) >= MOST


def unanswered(entries: Sequence[Entry], plan_sha256: str) -> set[str]:
    """Hashes of the questions of a plan that ended in `not_answered` with a place held, since the site's
    people last said to go on, and were not answered later."""
    refused = set[str]()
    for record in (entry.record for entry in entries if entry.record.get("plan") == plan_sha256):
        match record:
            case {"kind": "resumed"}:
                refused.clear()
            case {
                "kind": "refusal",
                "told": RefusalKind.NOT_ANSWERED,
                "question": str(question),
                "reserved": _,
            }:
                refused.add(question)
            case {"sha256": _, "question": str(question)}:
                refused.discard(question)
    return refused


def stopped_plans(entries: Sequence[Entry]) -> list[str]:
    """Hashes of the plans under which nothing is answered any more."""
    plans = {
        str(entry.record["plan"])
        for entry in entries
        if entry.record.get("kind") == "refusal" and "plan" in entry.record
    }
    return sorted(plan for plan in plans if is_stopped(entries, plan))


def resume(journal: Journal, plan_sha256: str) -> None:
    """Note that the site's people looked, and that questions of this plan are answered again."""
    journal.append({"kind": "resumed", "plan": plan_sha256, "uid": os.getuid()})
