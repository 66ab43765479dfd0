"""Tables and records that a simulation writes: manifests of scans where they lie, CSV, JSON. All atomic."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.scans.layouts import Candidate
from scans.scans import Exclusion
from simulations.hospitals.plans import TRUTH
from storage.files import write_whole


def write_manifest(path: Path, candidates: Sequence[Candidate]) -> None:
    """A manifest of scans where they lie: absolute paths, and every covariate known of them. Atomic."""
    columns = ["path", "patient", "modality", "label"]
    names = sorted({name for candidate in candidates for name in candidate.covariates} - set(columns))
    rows: list[list[object]] = []
    for candidate in candidates:
        label = str(candidate.label.resolve()) if candidate.label else ""
        known = [candidate.covariates.get(name, "") for name in names]
        rows.append([str(candidate.path.resolve()), candidate.patient, candidate.modality, label, *known])
    write_table(path, columns + names, rows)


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV. Atomic."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_whole(path, text.getvalue().encode())


def write_left_out(folder: Path, root: Path, exclusions: Sequence[Exclusion]) -> None:
    """List the files of a shared folder that reach no hospital, with the reason: `truth/left_out.csv`."""
    rows = [
        (path.relative_to(root) if path.is_relative_to(root) else path, e.reason.value, e.detail)
        for e in exclusions
        for path in e.all_files
    ]
    write_table(folder / TRUTH / "left_out.csv", ["path", "reason", "detail"], rows)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in order. Atomic."""
    write_whole(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; empty where there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
