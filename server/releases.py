"""The register of a run: what came from sites, what was made of it, and what a withdrawal touches.

Everything that a site sent is a line of the run's journal; everything that was made of it lies in the run's
folder. A site that withdraws gets a line of its own in the journal, which stays (a tombstone), and every file
that its releases went into is marked in `withdrawn.json` beside it, so that whoever loads it is told
(`meduet_models/published/withdrawals.py`). A model cannot forget: a mark is a reason to train again, not a
cure.

Does not do: take a site's latents out of the bank (`meduet-server bank forget`), find copies outside of the
folder, or stop a site from answering: that is the site's own `plan withdraw`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.journal import Journal, read_journal
from federation.keys.key_files import read_text
from federation.published_plan import plan_of
from meduet_models.published.withdrawals import mark, marked
from meduet_models.weights import sha256_of_file

WITHDRAWAL = "withdrawal"
"""Kind of the journal's line."""
_ROUND = re.compile(r"round-(\d+)\.safetensors")
_PLAN = "plan.json"
_MADE = (
    "model.safetensors", "diffusion.safetensors", "finetuned.safetensors", "diffusion/*.safetensors",
    "checkpoints/round-*.safetensors",
)  # fmt: skip
"""What a run's folder holds that was made of releases; the latent bank has a register of its own."""


@dataclass(frozen=True)
class Received:
    """What a site sent, as the journal says."""

    site: str
    kind: str
    """The question that it answers."""
    round: int
    """0 for what was asked before the first round; what is asked after the last has none either."""
    bytes: int
    sha256: str
    plan: str
    utc: str
    withdrawn: bool
    """Whether the site withdrew since."""


@dataclass(frozen=True)
class Made:
    """A file that was made of what sites sent."""

    file: str
    """Below the run's folder."""
    sha256: str
    sites: tuple[str, ...]
    """Whose releases went into it."""
    withdrawn: tuple[str, ...]
    """Who of them withdrew since."""
    expires: str
    """Last day on which it may be used, by the run's plan; empty: no such day."""


@dataclass(frozen=True)
class Register:
    """All of a run."""

    received: tuple[Received, ...]
    made: tuple[Made, ...]


def register(folder: Path) -> Register:
    """The register of the run in `folder`. Raises `ValueError` where is none, or its journal is broken."""
    entries = read_journal(folder / "journal.jsonl")
    gone = {e.record["site"] for e in entries if e.record.get("kind") == WITHDRAWAL}
    received = tuple(
        Received(
            site=str(e.record["site"]),
            kind=str(e.record.get("to", "?")),
            round=int(e.record.get("round", 0)),
            bytes=int(e.record.get("bytes", 0)),
            sha256=str(e.record.get("sha256", "")),
            plan=str(e.record.get("plan", "")),
            utc=e.utc,
            withdrawn=e.record["site"] in gone,
        )
        for e in entries
        if e.record.get("kind") == "reply"
    )
    expires = _expires(folder)
    files = sorted({path for pattern in _MADE for path in folder.glob(pattern) if path.is_file()})
    return Register(received, tuple(_made(folder, path, received, expires) for path in files))


def withdraw(folder: Path, site: str, reason: str) -> list[Made]:
    """Note that a site withdrew what it released in this run, and mark every file that was made of it.

    Returns these files. Said twice, it marks what was made meanwhile. Raises `ValueError` when the site
    released nothing here, or no reason is given; nothing is written then.
    """
    if not reason.strip():
        raise ValueError("Expected a reason for the record; got none. Nothing was written.")
    before = register(folder)
    if site not in (names := {one.site for one in before.received}):
        raise ValueError(
            f"Expected a site that released something here ({', '.join(sorted(names)) or 'none did'}); got "
            f"{site[:80]!r}. Nothing was written."
        )
    touched = [one for one in before.made if site in one.sites]
    record: dict[str, Any] = {
        "kind": WITHDRAWAL,
        "site": site,
        "reason": reason.strip(),
        "descendants": {one.file: one.sha256 for one in touched},
    }
    Journal(folder / "journal.jsonl").append(record)
    for one in touched:
        mark(folder / one.file, site)
    return touched


def _expires(folder: Path) -> str:
    """What the run's plan says; empty where the folder has none."""
    path = folder / _PLAN
    return plan_of(read_text(path, "a plan")).release.expires if path.is_file() else ""


def _made(folder: Path, path: Path, received: tuple[Received, ...], expires: str) -> Made:
    """A checkpoint is made of what came up to its round; the rest of everything."""
    match = _ROUND.fullmatch(path.name)
    last = int(match[1]) if match else None
    sites = {one.site for one in received if last is None or one.round <= last}
    return Made(
        file=path.relative_to(folder).as_posix(),
        sha256=sha256_of_file(path),
        sites=tuple(sorted(sites)),
        withdrawn=tuple(sorted(marked(path))),
        expires=expires,
    )
