"""An audit from evidence to files: attack, decide, write `audit.json` and `audit.html`, say what was found.

What this file does not do: open a run or a site, or parse a command line's other settings.
"""

import argparse
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from audit.attacks.by_kind import audit
from audit.effort import QUICK, Effort
from audit.evidence import Evidence
from audit.planted import planted
from audit.policy import Policy, decide, read_policy
from audit.record.artefacts import Audited
from audit.record.kept import FOLDER as KEPT
from audit.record.kept import KeptFindings
from audit.record.page import first_sentences, page_of
from audit.record.record import record_of, to_json
from storage.files import private_folder, write_whole

FOLDER = "audit"
"""Where an audit goes, below what was audited."""
_LIBRARIES = ("fedmeduet", "torch", "numpy", "scipy")
Say = Callable[[str], None]


def asked_effort(chosen: argparse.Namespace) -> Effort:
    """How much is done. Raises `ValueError` for a number of draws that means nothing."""
    effort = QUICK if chosen.quick else Effort()
    if chosen.null is None:
        return effort
    if not 1 <= chosen.null <= 100_000:
        raise ValueError(f"Expected --null of 1 to 100000 draws; got {chosen.null}.")
    return dataclasses.replace(effort, null_draws=chosen.null)


def asked_policy(chosen: argparse.Namespace) -> Policy:
    """What is allowed. Raises `ValueError` as `read_policy`."""
    return Policy() if chosen.policy is None else read_policy(chosen.policy)


def write_audit(
    evidence: Evidence, folder: Path, policy: Policy, effort: Effort, command: str, say: Say
) -> int:
    """Attack everything and write both files into `folder`; returns the exit status.

    What was found there before, of the same and with the same effort, is not looked for again.
    """
    began = time.monotonic()
    audited = audit(evidence, effort, say, KeptFindings(folder / KEPT))
    return write_report(evidence, audited, folder, policy, command, say, began)


def write_report(
    evidence: Evidence,
    audited: Audited,
    folder: Path,
    policy: Policy,
    command: str,
    say: Say,
    began: float | None = None,
) -> int:
    """Decide about what was found and write both files into `folder`; returns the exit status. `began`: when
    it was begun to look, by the monotonic clock; none: now."""
    began = time.monotonic() if began is None else began
    say("faults that are built in on purpose")
    faults = planted()
    charged = {one.name: (one.epsilon, one.delta) for one in audited.artefacts}
    decision = decide(policy, audited.findings, charged, audited.behind)
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    about = {
        "audited_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": {"python": platform.python_version(), **versions},
        "seconds": time.monotonic() - began,
    }
    record = record_of(evidence, audited, policy, decision, faults, about)
    private_folder(folder)
    write_whole(folder / "audit.json", to_json(record))
    write_whole(folder / "audit.html", page_of(record))
    for where, text in first_sentences(record):
        say(f"{where}: {text}")
    for text in decision.undecided:
        say(f"Undecided: {text}")
    say(f"Exit status {decision.status}. The page: {(folder / 'audit.html').resolve()}")
    return decision.status
