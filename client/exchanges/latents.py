"""Released latents: the one place that decides whose latents leave a site, under which policy and names.

`raw`: latents of training scans leave as they are, each scaled to the plan's bound. They are patient data:
the decoder is public, so the scans can be reconstructed from them, and the minimum cohort, which is a rule
about sums, protects no single item. They leave sealed to the bank's key, which the plan names; a plan without
one is refused before a scan is read. A site takes part in such a plan only if its site.yaml says so in the
words of the policy (`federation/plan/release_policy.py`). `federated`: no latent leaves. What leaves with
noise has exchanges of its own (`synthetic_latents.py`, `latent_moments.py`).

Items leave under opaque names: a keyed hash of the scan, whose key stays here. The site's own table
released_latents.csv says which scan is which, so that a patient who withdraws can be taken out at the centre.
Does not do: let anything out by itself (`client/release.py`), or touch validation and test patients.
"""

import csv
import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from client.exchanges.exchange import Answer, AskRefused, OnStep, SiteAtWork
from client.latents.examples import ScansWithGeometry, examples_of
from client.release import Gate, Released
from client.scans.cohort import ScanEntry
from client.scans.names import readable
from client.secrets.site_secret import digest_of, site_secret
from federation.exchanges.latents import (
    BOUNDED,
    LATENTS,
    LatentsAsk,
    LatentsReply,
    ToldLatents,
    banked,
    from_tensors,
    nothing,
    releases_of,
    releasing,
    to_tensors,
    told_shapes,
)
from federation.plan.plan import RunPlan
from federation.wire.sealing import check_recipient
from federation.wire.wire import RefusalKind

KEY_NAME = "latent-items.key"
TABLE_NAME = "released_latents.csv"


@runtime_checkable
class ReleasableScans(ScansWithGeometry, Protocol):
    """What a release needs of a site's latents (`client/latents/latent_set.py`)."""

    @property
    def entries(self) -> Sequence[ScanEntry]:
        """The scan of each row."""


def consent(plan: RunPlan, sentence: str) -> str:
    """What the plan makes leave for its diffusion model, in words, where the site has agreed to it.

    Raises `AskRefused` where it has not. Reads no scan.
    """
    policy = plan.latent_policy
    if policy.consent in ("", sentence):
        if policy.sealed:
            _check_recipient(plan)
        return policy.agreed
    raise AskRefused(
        f"Plan {plan.sha256[:8]}… makes sites release {policy.warning}; this site has not agreed to that "
        "(site.yaml: latent_release). Nothing was read.",
        RefusalKind.PLAN_NOT_ACCEPTED,
    )


def _check_recipient(plan: RunPlan) -> None:
    try:
        check_recipient(banked(plan).recipient)
    except ValueError as error:
        raise AskRefused(f"{error} Nothing was read.", RefusalKind.PLAN_NOT_ACCEPTED) from None


def answer_latents(site: SiteAtWork, ask: LatentsAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    """Items `ask.first` to `ask.first + ask.count` of what this site releases in a round.

    Guarantee: only training scans, each bounded by itself; nothing else. Raises `AskRefused` for scans
    that do not fit the plan.
    """
    scans = site.scans(plan)
    if not isinstance(scans, ReleasableScans):
        raise AskRefused("Expected a site that knows the geometry of its scans.", RefusalKind.INTERNAL)
    released = raw_items(scans, plan, ask.round, site.secret)
    rows = released[ask.first : ask.first + ask.count]
    key = site_secret(site.state_dir / KEY_NAME)
    names = [item_name(key, scans, row) for row in rows]
    try:
        tensors = to_tensors(examples_of(scans, rows, plan)) if rows else nothing(plan)
    except ValueError as error:
        raise AskRefused(str(error), RefusalKind.PLAN_NOT_ACCEPTED) from error
    _note(site.state_dir / TABLE_NAME, scans, dict(zip(names, rows, strict=True)))
    return gate.release(
        tensors,
        told_shapes(plan, len(rows)),
        weight=float(len(rows)),
        counts={"first_item": ask.first, "num_items": len(released)},
        not_covered=frozenset(tensors) - {BOUNDED},
        items=names,
        wire_dtype=plan.release.latent_dtype,
    )


def latents_mail(released: Released, ask: LatentsAsk, site: str) -> LatentsReply:
    """The reply, sealed to the bank's key."""
    told = ToldLatents(
        plan_sha256=ask.plan_sha256,
        site=site,
        round=released.record["round"],
        first=released.counts["first_item"],
        total=released.counts["num_items"],
        items=tuple(released.record["items"]),
        examples=from_tensors(dict(released.tensors)),
        wire_dtype=released.wire_dtype,
    )
    return told.sealed_to(releasing(ask.plan()).recipient)


def raw_items(scans: ReleasableScans, plan: RunPlan, round_number: int, secret: bytes) -> list[int]:
    """Rows that leave in a round, in the order in which they leave.

    Training scans in an order drawn from the site's secret: neither file names nor the order of the folder
    show, and who holds a copy of a scan cannot tell its place. Raises `ValueError` as `releases_of`.
    """

    def place(row: int) -> bytes:
        return digest_of(secret, "latents", plan.seed, scans.entries[row].scan_id)

    rows = sorted(scans.indices("train"), key=place)
    return [rows[number] for number in releases_of(plan, round_number, len(rows))]


def item_name(key: bytes, scans: ReleasableScans, row: int) -> str:
    """The name under which a scan's latents leave, 32 hex digits: without the key it tells nothing."""
    known = f"{int(scans.site_index[row])}\0{scans.entries[row].scan_id}"
    return hmac.new(key, known.encode(), hashlib.sha256).hexdigest()[:32]


def _note(path: Path, scans: ReleasableScans, rows: dict[str, int]) -> None:
    """Say in the site's own table which scan is which item."""
    known: set[str] = set()
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as table:
            known = {row["item"] for row in csv.DictReader(table)}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a", encoding="utf-8", newline="") as table:
        writer = csv.writer(table)
        if not known and not table.tell():
            writer.writerow(("item", "patient", "scan"))
        for name, row in rows.items():
            if name not in known:
                writer.writerow((name, scans.patients[row], readable(str(scans.entries[row].path))))


ANSWER = Answer(LATENTS, answer_latents, latents_mail)
