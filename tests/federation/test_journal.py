from pathlib import Path

import pytest

from federation.journal import BrokenChain, Journal


def test_a_journal_returns_the_hash_of_its_line_and_counts_its_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    first = journal.append({"kind": "survey", "bytes": 10})
    second = journal.append({"kind": "round", "bytes": 20})
    assert [e.sha256 for e in journal.entries()] == [first, second]
    assert journal.entries()[1].previous == first
    assert journal.verify() == 2


def test_an_edited_journal_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for size in (10, 20, 30):
        journal.append({"kind": "round", "bytes": size})
    path.write_text(path.read_text().replace('"bytes":20', '"bytes":2'))
    with pytest.raises(BrokenChain, match=r"journal\.jsonl: line 2 "):
        Journal(path)
