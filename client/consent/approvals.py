"""What this hospital has agreed to: plans, by their hash and the hash of their code, and at which hours.

Approvals are lines of a hash-chained file (`approvals.jsonl` in the state folder); the last line about a plan
counts; where several people must agree, the signed approvals since the last withdrawal (`approvers.py`).
The plans that somebody has looked at are kept beside it (`plans/`). Does not do: judge a plan; prove who
approved it where no approver has a key (whoever may write to the state folder may approve then); or notice
that its last lines were cut off (compare `head` with a copy kept elsewhere).
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import time
from pathlib import Path
from typing import Any

from client.consent.approvers import ApprovalRule, Signer, signed, statement
from federation.keys.key_files import read_text
from federation.published_plan import PublishedPlan
from forms.ranges import shown
from privacy.chain import Chain, Entry
from storage.files import private_folder, write_whole

SHORTEST = 12
"""Hex digits of a plan's hash that name it, at least."""


class Approvals(Chain):
    """The book of approvals of `site`, read by its `rule`, and the published plans it speaks of."""

    def __init__(self, state_dir: Path, rule: ApprovalRule | None = None, site: str = "") -> None:
        super().__init__(state_dir / "approvals.jsonl", purpose="approvals")
        self._plans = state_dir / "plans"
        self.rule = rule or ApprovalRule()
        self._site = site

    def keep(self, published: PublishedPlan) -> None:
        """Keep a plan that was looked at, so that its hash can be approved."""
        private_folder(self._plans)
        write_whole(self._plans / published.file_name, published.to_json().encode())

    def kept(self) -> Iterator[PublishedPlan]:
        """The plans that were looked at, by hash."""
        for path in sorted(self._plans.glob("*.plan.json")):
            text = read_text(path, "a plan that was shown")
            try:
                yield PublishedPlan.from_json(text)
            except ValueError as error:
                raise ValueError(f"Expected {path} to be a plan that was shown; {error}") from None

    def find(self, sha256: str) -> PublishedPlan:
        """The kept plan of a hash, or of its first digits; raises `ValueError`."""
        if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", sha256):
            raise ValueError(f"Expected a plan's hash, {SHORTEST} to 64 hex digits; got {shown(sha256)}.")
        found = [one for one in self.kept() if one.sha256.startswith(sha256)]
        if len(found) != 1:
            raise ValueError(
                f"Expected one plan that was looked at with hash {sha256[:12]}…; there are {len(found)}. "
                "Look at it first: meduet-site plan show FILE."
            )
        return found[0]

    def approve(self, published: PublishedPlan, signer: Signer | None = None) -> None:
        """Note that this hospital agrees to `published`, or one of its approvers does.

        Raises `ValueError` where approvals need a signature and nobody signs, or the other way round.
        """
        if bool(self.rule.people) != (signer is not None):
            expected = "an approver's key" if self.rule.people else "no key: site.yaml names no approvers"
            raise ValueError(f"Expected {expected} (site.yaml: approvals.people).")
        self._note("approval", published, signer)

    def withdraw(self, published: PublishedPlan) -> None:
        """Note that this hospital no longer agrees, whoever approved; a round that has begun is not stopped.

        Needs no key: anybody at the site may stop.
        """
        self._note("withdrawal", published, None)

    def approvers(self, sha256: str) -> dict[str, str]:
        """Who approved the plan of this hash since it was last withdrawn, and the hash of the code each did
        so with. Where no approver has a key: "this site"."""
        found: dict[str, str] = {}
        for entry in self.entries():
            record = entry.record
            if record.get("plan") != sha256:
                continue
            if record["kind"] != "approval":
                found.clear()
            elif not self.rule.people:
                found["this site"] = record["bundle"]
            else:
                said = statement(self._site, sha256, record["bundle"], entry.previous)
                if (name := signed(said, record, self.rule.people)) is not None:
                    found[name] = record["bundle"]
        return found

    def approved_bundle(self, sha256: str) -> str | None:
        """Hash of the code with which enough people approve the plan of this hash; None when too few do.

        Where several codes are, that of the latest approval.
        """
        bundles = list(self.approvers(sha256).values())
        enough = [bundle for bundle in bundles if bundles.count(bundle) >= self.rule.needed]
        return enough[-1] if enough else None

    def _note(self, kind: str, published: PublishedPlan, signer: Signer | None) -> None:
        record: dict[str, Any] = {
            "kind": kind,
            "plan": published.sha256,
            "bundle": published.bundle_sha256,
            "name": published.plan.name,
            "uid": os.getuid(),
        }

        def line(_: Sequence[Entry]) -> dict[str, Any]:
            if signer is None:
                return record
            said = statement(self._site, published.sha256, published.bundle_sha256, self.head)
            return {**record, "by": signer.name, "signature": signer.sign(said)}

        self.extend(line)


@dataclass(frozen=True)
class AllowedHours:
    """Hours of the day, local time, in which work may begin; `end` before `begin` passes midnight."""

    begin: time
    end: time

    @staticmethod
    def parse(text: str) -> "AllowedHours":
        """From "18:00-06:00"; raises `ValueError`."""
        match = re.fullmatch(r"([0-2]\d:[0-5]\d)-([0-2]\d:[0-5]\d)", text)
        try:
            begin, end = (time.fromisoformat(part) for part in match.groups()) if match else (None, None)
        except ValueError:
            begin = end = None
        if begin is None or end is None or begin == end:
            raise ValueError(f'Expected allowed_hours as "18:00-06:00", or "" for always; got {text!r}.')
        return AllowedHours(begin, end)

    def contain(self, now: time) -> bool:
        """Whether work may begin at `now`."""
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end
