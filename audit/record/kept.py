"""What an audit found of each artefact, kept beside its report, so that one that was stopped goes on.

A file for each artefact, under a key: a hash of its name, of the hashes of what left, of every file and scan
that the audit reads, of how much is tried, and of the audit's own code. Another key: it is looked for again.

What this file does not do: keep the report, or what a check against nobody's membership counted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from audit.attacks.scores import Scores
from audit.effort import Effort
from audit.evidence import Evidence
from audit.findings import Finding
from forms.form import build
from forms.json_text import canonical, read_json, sha256_of
from meduet_models.weights import sha256_of_tensors
from storage.files import private_folder, write_whole

FOLDER = "findings"
_LONGEST = 50_000_000


@dataclass(frozen=True)
class Found:
    """What was found of one artefact."""

    findings: tuple[Finding, ...]
    scores: tuple[Scores, ...]
    """Behind the findings that are areas under a curve."""


class KeptFindings:
    """The findings in a folder; `None`: none are kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @staticmethod
    def nowhere() -> "KeptFindings":
        """Keeps nothing."""
        return KeptFindings(None)

    def read(self, artefact: str, key: str) -> Found | None:
        """What was found under this key; None where that is not kept, or not whole."""
        if self._folder is None or not (path := self._path(self._folder, artefact)).is_file():
            return None
        try:
            kept = read_json(path.read_text(encoding="utf-8"), "findings of an audit", longest=_LONGEST)
            if not isinstance(kept, dict) or kept["key"] != key:
                return None
            findings = tuple(build(Finding, one, "finding") for one in kept["findings"])
            return Found(findings, tuple(_scores(one) for one in kept["scores"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, artefact: str, key: str, found: Found) -> None:
        """Keep what was found."""
        if self._folder is None:
            return
        values = {
            "key": key,
            "findings": [dataclasses.asdict(one) for one in found.findings],
            "scores": [_plain(one) for one in found.scores],
        }
        private_folder(self._folder)
        write_whole(self._path(self._folder, artefact), json.dumps(values, allow_nan=False))

    @staticmethod
    def _path(folder: Path, artefact: str) -> Path:
        return folder / f"{sha256_of(artefact)[:16]}.json"


def options_of(evidence: Evidence, effort: Effort) -> str:
    """A hash of everything but the artefact that findings depend on."""
    cohorts = {
        site: [
            sha256_of_tensors({"latents": one.latents}),
            list(one.patients),
            list(one.took_part),
            None if one.measured is None else sha256_of_tensors({"measured": one.measured}),
            {name: list(values) for name, values in one.groups.items()},
            [dict(values) for values in one.covariates],
        ]
        for site, one in evidence.cohorts.items()
    }
    read = [evidence.plan.sha256, dict(evidence.hashes), cohorts, dataclasses.asdict(effort), code_sha256()]
    return sha256_of(canonical(read))


def key_of(artefact: str, hashes: Sequence[str], options: str) -> str:
    """Of one artefact, whose releases have these hashes."""
    return sha256_of(canonical([artefact, list(hashes), options]))


@cache
def code_sha256() -> str:
    """A hash of the audit's own code."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _plain(scores: Scores) -> dict[str, Any]:
    return {name: values.tolist() for name, values in vars(scores).items() if isinstance(values, np.ndarray)}


def _scores(kept: dict[str, Any]) -> Scores:
    return Scores(
        np.array(kept["values"], dtype=float),
        np.array(kept["member"], dtype=bool),
        np.array(kept["site"], dtype=int),
    )
