"""A patient who withdrew is forgotten at her site: what was derived from her goes, she takes part no more.

In this order, each step whole or not at all, and all of them again when the command is given again: she and
her scans are on the list of who takes no part; encodings, prepared volumes, memos and rows of tables that
hold her go; so do answers that are kept and states of training, since nobody can tell her share in them from
another's; a line without her name goes into the journal; last of all her rows of the table of released
latents, which the steps before need. Does not do: touch her scans in the data folder, or reach what left: the
releases that may hold her are named, so that the centre can be told (`meduet-server bank forget`, `releases
withdraw`). Logs are not searched.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.books.answers import ANSWERS
from client.books.books import JOURNAL
from client.books.forgotten import Forgotten
from client.consent.confirmation import FILE as CONFIRMED
from client.exchanges.latents import TABLE_NAME
from client.latents.cache_files import CacheFiles, DamagedEncoding
from client.latents.encoding import FINGERPRINTS
from client.latents.latent_set import open_stored
from client.latents.prepared_volumes import volume_path
from client.release import OF_RANDOM_NUMBERS
from client.releases import releases_of
from client.scans.judgement_memo import without_scans
from client.settings import SiteConfig, approvals_of
from client.site import Site
from client.site_scans import survey_site
from federation.journal import Journal, read_journal
from privacy.chain import Entry
from scans.scans import UnusableScan
from scans.volume_plan import VolumePlan
from scans.volumes import read_files
from storage.files import write_whole

KIND = "patient_forgotten"
"""Kind of the journal's line."""


@dataclass(frozen=True)
class Dependents:
    """What left this site and may hold her; nothing here can take it back."""

    items: tuple[str, ...]
    """Latents of her scans, under the names under which they left."""
    releases: tuple[Mapping[str, Any], ...]
    """Releases before she withdrew (rows of `client/releases.py`): sums and updates may hold her, whether she
    was in each is not kept; latents are among them only where hers are."""


def forget(site: Site, patient: str) -> Dependents:
    """Forget a patient, by her name in cohort.csv; what left and still depends on her.

    Given again, it does what is left to do and says the same. Raises `ValueError` for a patient that this
    site does not know; nothing is changed then.
    """
    config, book = site.config, Forgotten(site.config.state_dir)
    items = _items(config, patient)
    files, scan_ids = _scans(config, patient)
    if not (book.patient(patient) or scan_ids or files or items):
        raise ValueError(
            "Expected a patient of this site, by the name in cohort.csv; there is none. Nothing was changed."
        )
    book.add(patient, scan_ids)
    _forget_cut_off(config)
    _forget_encodings(config, book, site.cache_files)
    _forget_memos(config, book)
    _forget_rows(config, patient, files)
    _forget_rounds(config)
    line = _journaled(site.journal, book.mark(patient), items)
    _without(config.state_dir / TABLE_NAME, lambda row: row.get("patient") == patient)
    return _dependents(config, line)


def _items(config: SiteConfig, patient: str) -> tuple[str, ...]:
    """The names under which latents of her left."""
    return tuple(row["item"] for row in _rows(config.state_dir / TABLE_NAME) if row.get("patient") == patient)


def _scans(config: SiteConfig, patient: str) -> tuple[set[Path], set[str]]:
    """Her files and the hashes of her scans: of what lies in the data folder, and of what the tables know."""
    rows = _rows(config.state_dir / "cohort.csv")
    known = {row["scan_id"] for row in rows if row.get("patient") == patient}
    try:
        hers = [one for one in survey_site(config).candidates if one.patient == patient]
    except ValueError:  # not mounted: what was derived from her goes all the same
        hers = []
    ways = {published.plan.volumes.four_d for published in approvals_of(config).kept()}
    for one in hers:
        for four_d in sorted(ways | {VolumePlan(modality="any").four_d}):
            try:
                known.add(read_files(one.files, four_d).scan_id)
            except UnusableScan:  # it never took part either
                continue
    return {path for one in hers for path in (*one.files, *filter(None, [one.label]))}, known


def _forget_cut_off(config: SiteConfig) -> None:
    """Files that a kill left half written (`storage/files.py`), whatever they hold."""
    for folder in {config.state_dir, config.cache_folder}:
        for path in sorted(folder.rglob(".*.????????")):
            path.unlink(missing_ok=True)


def _forget_encodings(config: SiteConfig, book: Forgotten, files: CacheFiles) -> None:
    """Encodings of her scans, and those that do not say of whom they are: these are made again."""
    for path in sorted(config.cache_folder.glob("??/*.safetensors")):
        try:
            stored = open_stored(path, files)
        except DamagedEncoding:
            stored = None
        if stored is None or not stored.scan_id or book.scan(stored.scan_id):
            volume_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _forget_memos(config: SiteConfig, book: Forgotten) -> None:
    """Memos of cohorts, which name her; hashes of labels; her lines among the judgements."""
    for folder in (config.state_dir, config.cache_folder):
        for path in (*folder.glob("cohort.json"), *folder.glob("cohort-*.json"), folder / FINGERPRINTS):
            path.unlink(missing_ok=True)
        for path in (*folder.glob("cohort.judged"), *folder.glob("cohort-*.judged")):
            without_scans(path, book.scan)


def _forget_rows(config: SiteConfig, patient: str, files: set[Path]) -> None:
    """Her rows in the site's tables, and what was confirmed of her."""
    root = config.data_root if config.data_root.is_dir() else config.data_root.parent
    below = {path.relative_to(root).as_posix() for path in files if path.is_relative_to(root)}
    _without(config.state_dir / "cohort.csv", lambda row: row.get("patient") == patient)
    _without(config.state_dir / "exclusions.csv", lambda row: row.get("path") in below)
    path = config.state_dir / CONFIRMED
    if path.is_file():
        confirmed = json.loads(path.read_bytes())
        kept = {scan: who for scan, who in confirmed["patients"].items() if who != patient}
        if kept != confirmed["patients"]:
            write_whole(path, json.dumps({**confirmed, "patients": kept}, indent=0))


def _forget_rounds(config: SiteConfig) -> None:
    """Answers that are kept, and states of rounds but for the common start, in which no patient is."""
    for folder in (ANSWERS, "state", "diffusion"):
        for path in sorted((config.state_dir / folder).glob("*/*.safetensors")):
            if folder == ANSWERS or path.name != "round-0000.safetensors":
                path.unlink(missing_ok=True)


def _journaled(journal: Journal, mark: str, items: Sequence[str]) -> Entry:
    """The line that says that somebody was forgotten, written once."""
    record = {"kind": KIND, "mark": mark, "items": list(items)}
    journal.extend(lambda entries: None if _line(entries, mark) else record)
    line = _line(journal.entries(), mark)
    assert line is not None, "just written"
    return line


def _line(entries: Sequence[Entry], mark: str) -> Entry | None:
    lines = (entry for entry in entries if entry.record.get("kind") == KIND)
    return next((entry for entry in lines if entry.record["mark"] == mark), None)


def _dependents(config: SiteConfig, line: Entry) -> Dependents:
    """What left before the line that says that she was forgotten."""
    items = tuple(line.record["items"])
    earlier = read_journal(config.state_dir / JOURNAL)[: line.index]
    held = {entry.record["sha256"]: entry.record["items"] for entry in earlier if "items" in entry.record}
    hashes = {entry.record.get("sha256") for entry in earlier}
    return Dependents(
        items,
        tuple(
            row
            for row in releases_of(config)
            if row["sha256"] in hashes
            and row["kind"] not in OF_RANDOM_NUMBERS
            and not (row["sha256"] in held and set(items).isdisjoint(held[row["sha256"]]))
        ),
    )


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as table:
            yield from csv.DictReader(table)


def _without(path: Path, hers: Callable[[Mapping[str, str]], bool]) -> None:
    """Write a table again without her rows, where it has any."""
    rows = list(_rows(path))
    kept = [row for row in rows if not hers(row)]
    if len(kept) < len(rows):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
        write_whole(path, text.getvalue())
