"""A site's own tables: manifests and covariates, as text in CSV or TSV.

What a table says is taken literally; a table that cannot be understood is the site's mistake and a
`ValueError` with the file's name, for the site's own eyes. It decides nothing about scans.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

Covariates = dict[str, str | float]

PATIENT_COLUMNS = ("patient", "participant_id", "patient_id", "subject")
MISSING = ("", "n/a", "na", "nan")


def read_covariates(table: Path) -> dict[str, Covariates]:
    """Covariates by patient: numbers where the text is one; empty and `n/a` are left out.

    Raises `ValueError` when no column names the patient, or a patient has two rows.
    """
    columns, rows = read_table(table)
    keys = [name for name in PATIENT_COLUMNS if name in columns]
    if not keys:
        raise ValueError(f"Expected {table} to have a column {' or '.join(PATIENT_COLUMNS)}; got {columns}.")
    found: dict[str, Covariates] = {}
    for row in rows:
        if row[keys[0]] in found:
            raise ValueError(f"Expected one row per patient in {table}; {row[keys[0]]!r} has two.")
        found[row[keys[0]]] = covariates_of(row, {keys[0]})
    return found


def read_table(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV (or, by its name, TSV) file; cells are stripped of blanks.

    Raises `ValueError` when a row has more or fewer cells than there are columns.
    """
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ",")
        rows = list(reader)
    columns = list(reader.fieldnames or [])
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"Expected {len(columns)} cells in row {number} of {table}; got another number.")
    return columns, [{name: cell.strip() for name, cell in row.items()} for row in rows]


def covariates_of(row: Mapping[str, str], without: set[str]) -> Covariates:
    """The cells of a row but those of the columns `without`: numbers where the text is one, nothing where
    missing."""
    kept = {k: v for k, v in row.items() if k not in without and v.lower() not in MISSING}
    return {name: _number_or_text(cell) for name, cell in kept.items()}


def _number_or_text(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell
