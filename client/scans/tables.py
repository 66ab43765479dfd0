"""A site's own tables: manifests and covariates, as spreadsheets save them.

Read where there is one way to read them: UTF-8 with or without a mark, UTF-16, Latin-1 letters; commas,
semicolons, tabs or bars; any case of headers; empty columns and rows at the end. Where there are two, the
table is the site's mistake and a `ValueError` with file, row and cure, for the site's own eyes. A table that
was joined says how: which column, how many rows, how many scans. It decides nothing about scans.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.scans.names import readable

Covariates = dict[str, str | float]

PATIENT_COLUMNS = (
    "patient", "participantid", "patientid", "subject", "subjectid", "participant", "sub", "case", "caseid",
    "pseudonym", "id",
)  # fmt: skip
"""Headers of a column that names patients, as `_folded`; the first that a table has."""
MISSING = ("", "n/a", "na", "nan", "-", "null", "none")
TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
LOWERED = ("age", "sex", "body_part")
"""Covariates that plans name so, whatever case a table's header has."""
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Table:
    """A table as text."""

    path: Path
    columns: tuple[str, ...]
    """As written, blanks stripped."""
    rows: tuple[Mapping[str, str], ...]
    numbers: tuple[int, ...]
    """Line of each row in the file; the header's is 1."""
    separator: str = ","
    note: str = ""
    """How it was read, where that was not as UTF-8 with the separator of its name."""

    def column(self, *names: str) -> str:
        """The column with the first of these names, whatever its case, blanks and underscores; "" if none."""
        folded = {_folded(column): column for column in self.columns}
        return next((folded[name] for name in map(_folded, names) if name in folded), "")


@dataclass(frozen=True)
class Join:
    """What came of a table: for a person to see that it was the right one."""

    table: Path
    column: str
    """That of the patients."""
    num_rows: int = 0
    rows_without_scan: int = 0
    num_scans: int = 0
    scans_without_row: int = 0
    note: str = ""

    @property
    def summary(self) -> str:
        """In words; names no patient."""
        matched = self.num_rows - self.rows_without_scan
        text = f"column {self.column}: {matched} of {self.num_rows} rows have scans"
        text += f", {self.num_scans - self.scans_without_row} of {self.num_scans} scans have a row"
        return text + (f"; {self.note}" if self.note else "")

    @property
    def complete(self) -> bool:
        """Whether nothing was left over on either side."""
        return not (self.rows_without_scan or self.scans_without_row)


def read_table(path: Path) -> Table:
    """A CSV or TSV file as text; cells are stripped of blanks.

    Raises `ValueError` with file, row and cure when there is no single way to read it.
    """
    text, note = _text(path)
    lines = text.splitlines()
    if lines and (separator_line := re.fullmatch(r"sep=(.)", lines[0].strip('" '), re.IGNORECASE)):
        separator, text, above = separator_line[1], "\n".join(lines[1:]), 1  # Excel's own first line
    else:
        separator, above = _separator(path, text), 0
    if separator != ("\t" if path.suffix.lower() == ".tsv" else ","):
        note = "; ".join(filter(None, (note, f"separated by {_DELIMITERS.get(separator, separator)}")))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        found = [(reader.line_num + above, [cell.strip().strip("\ufeff") for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"Expected {path} to be a table; row {reader.line_num}: {error}. Save it as CSV again."
        ) from None
    found = [(number, row) for number, row in found if any(row)]
    if not found:
        raise ValueError(f"Expected {path} to have a header and rows; it is empty.")
    (_, header), *body = found
    columns = _columns(path, header, [row for _, row in body])
    rows = [_row(path, number, columns, row, separator) for number, row in body]
    return Table(path, columns, tuple(rows), tuple(number for number, _ in body), separator, note)


def _text(path: Path) -> tuple[str, str]:
    raw = path.read_bytes()
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if wide else "utf-8-sig"
    if not wide and b"\0" in raw[:2]:
        encoding, wide = ("utf-16-be" if raw[0] == 0 else "utf-16-le"), True
    try:
        return raw.decode(encoding), "read as UTF-16" if wide else ""
    except UnicodeDecodeError as error:
        if not wide and all(byte < 0x80 or byte >= 0xC0 for byte in raw):
            return raw.decode("latin-1"), "read as Latin-1"  # letters, in Windows-1252 the same
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"Expected {path} to be text in UTF-8; row {line} holds a byte ({raw[error.start]:#x}) that is no"
            " single letter. Save it as CSV UTF-8."
        ) from None


def _separator(path: Path, text: str) -> str:
    """The one separator that the header has outside of quotes; of several, the one that cuts every row into
    as many cells as the header."""
    header = re.sub(r'"[^"]*"', "", text.partition("\n")[0])
    present = [separator for separator in _DELIMITERS if separator in header]
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    if len(present) > 1:
        even = [separator for separator in present if _is_even(text, separator)]
        if len(even) == 1:
            return even[0]
        raise ValueError(
            f"Expected one separator in row 1 of {path}; it has "
            f"{' and '.join(_DELIMITERS[one] for one in present)}. Save it as CSV with commas."
        )
    return present[0] if present else usual


def _is_even(text: str, separator: str) -> bool:
    widths = Counter(
        len(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row
    )
    return len(widths) == 1 and max(widths) > 1


def _columns(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The header without nameless columns at its end that hold nothing."""
    width = len(header)
    while width and not header[width - 1] and not any(any(row[width - 1 :]) for row in rows):
        width -= 1
    columns = tuple(header[:width])
    if "" in columns:
        raise ValueError(
            f"Expected a header over every column of {path}; column {columns.index('') + 1} has none."
        )
    twice = [name for name, count in Counter(map(_folded, columns)).items() if count > 1]
    if twice:
        raise ValueError(f"Expected different headers in row 1 of {path}; {twice[0]!r} stands there twice.")
    return columns


def _row(path: Path, number: int, columns: Sequence[str], row: list[str], separator: str) -> dict[str, str]:
    if any(row[len(columns) :]) or len(row) < len(columns):
        raise ValueError(
            f"Expected {len(columns)} cells in row {number} of {path}, as in row 1; got {len(row)}. Correct"
            " it, or put cells that hold a separator in quotes."
        )
    return {
        name: _decimal(cell) if separator == ";" else cell for name, cell in zip(columns, row, strict=False)
    }


def _decimal(cell: str) -> str:
    """A number with a comma, which only tables without commas between cells have, with a point."""
    return cell.replace(",", ".") if re.fullmatch(r"-?\d+,\d+", cell) else cell


def read_covariates(path: Path) -> tuple[Table, str]:
    """The table at `path` and its column of patients.

    Raises `ValueError` when no column names the patient, or a patient has two rows.
    """
    table = read_table(path)
    column = table.column(*PATIENT_COLUMNS)
    if not column:
        raise ValueError(
            f"Expected {path} to have a column patient or participant_id; got {', '.join(table.columns)}."
        )
    first: dict[str, int] = {}
    for number, row in zip(table.numbers, table.rows, strict=True):
        if (before := first.setdefault(row[column], number)) != number:
            raise ValueError(
                f"Expected one row per patient in {path}; {readable(row[column])!r} has two (rows {before} "
                f"and {number})."
            )
    return table, column


def join_covariates(path: Path, scans: Sequence[Sequence[str]]) -> tuple[list[Covariates], Join]:
    """Covariates of each scan, and what came of it. A scan is given by the names that a row may call it by:
    first its patient's, last its file's (without extension).

    All rows are read as naming the same kind of thing, that which most scans answer to; `01` is `sub-01` and,
    where no two become one, `P1` is `p001`. Raises as `read_covariates`.
    """
    table, column = read_covariates(path)
    keys = [_stem(row[column]) for row in table.rows]
    found: list[int | None] = [None] * len(scans)
    by_file = False
    for kind in range(len(scans[0]) if scans else 0):
        for form in (str, _without_sub, _without_zeros):
            places, names = _places(keys, form), {scan[kind] for scan in scans}
            if places is None or len({form(name) for name in names}) < len(names):
                continue
            tried = [places.get(form(scan[kind])) for scan in scans]
            if len(tried) - tried.count(None) > len(found) - found.count(None):
                found, by_file = tried, kind == len(scans[0]) - 1
    used = set(found) - {None}
    notes = [table.note, "its cells are file names" if by_file else ""]
    if not used and keys and scans:
        notes.append("no row names a patient of the scans: compare it with cohort.csv")
    note = "; ".join(filter(None, notes))
    join = Join(path, column, len(keys), len(keys) - len(used), len(scans), found.count(None), note)
    of_rows = [covariates_of(row, {column}) for row in table.rows]
    return [{} if place is None else of_rows[place] for place in found], join


def _stem(cell: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", re.split(r"[/\\]", cell)[-1], flags=re.IGNORECASE)


def _places(keys: Iterable[str], form: Callable[[str], str]) -> dict[str, int] | None:
    """Place of each key by its form; None when two different keys have one form."""
    places: dict[str, int] = {}
    for place, key in enumerate(keys):
        if places.setdefault(form(key), place) != place:
            return None
    places.pop("", None)
    return places


def _without_sub(name: str) -> str:
    return re.sub(r"^sub[-_]", "", readable(name).casefold())


def _without_zeros(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[-_. ]", "", _without_sub(name)))


def covariates_of(row: Mapping[str, str], without: set[str]) -> Covariates:
    """The cells of a row but those of the columns `without`: numbers where the text is one, nothing where
    missing."""
    kept = {name: cell for name, cell in row.items() if name not in without and cell.lower() not in MISSING}
    return {_covariate(name): _number_or_text(cell) for name, cell in kept.items()}


def _covariate(name: str) -> str:
    return lowered if (lowered := name.lower().replace(" ", "_")) in LOWERED else name


def _number_or_text(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())
