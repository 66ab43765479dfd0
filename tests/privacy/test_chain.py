import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import privacy
from forms.json_text import canonical
from privacy.chain import BrokenChain, Chain


def written(path: Path, lines: int) -> Chain:
    chain = Chain(path, purpose="journal")
    for number in range(lines):
        chain.append({"kind": "round", "round": number})
    return chain


def test_what_was_appended_is_read_back_in_order_by_another_object(tmp_path: Path) -> None:
    written(tmp_path / "deep" / "journal.jsonl", 5)
    again = Chain(tmp_path / "deep" / "journal.jsonl", purpose="journal")
    assert [e.record["round"] for e in again.entries()] == [0, 1, 2, 3, 4]
    assert again.verify() == 5
    assert again.verify(head=again.head) == 5


def test_a_file_written_in_two_sittings_is_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = written(path, 2)
    second = written(path, 3)
    assert first.append({"kind": "survey"}) == first.head  # the first object noticed the second's lines
    assert first.verify() == second.verify() == 6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.integers(0, 3), offset=st.integers(0, 10_000), change=st.integers(1, 255))
def test_any_changed_byte_is_found_and_its_line_is_named(
    tmp_path: Path, line: int, offset: int, change: int
) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    chain = written(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[line])
    damaged[offset % (len(damaged) - 1)] ^= change  # the newline stays: that is the torn-line test
    path.write_bytes(b"".join([*lines[:line], bytes(damaged), *lines[line + 1 :]]))
    # A byte that became a newline makes two lines out of one; the first half is then the bad line.
    with pytest.raises(BrokenChain, match=f"line {line + 1} "):
        chain.verify()


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_removed_line_is_found_where_the_next_one_does_not_follow(tmp_path: Path, removed: int) -> None:
    path = tmp_path / "journal.jsonl"
    chain = written(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:removed] + lines[removed + 1 :]))
    with pytest.raises(BrokenChain, match=f"line {removed + 1} does not follow"):
        chain.verify()


def test_two_lines_that_changed_places_are_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    chain = written(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    with pytest.raises(BrokenChain, match="line 2 does not follow"):
        chain.verify()


def test_a_record_rewritten_with_a_fresh_hash_breaks_the_line_after_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    chain = written(path, 3)
    lines = path.read_text().splitlines()
    forged = written(tmp_path / "forged.jsonl", 1)
    forged.append({"kind": "round", "round": 99})
    middle = json.loads((tmp_path / "forged.jsonl").read_text().splitlines()[1])
    middle["previous"] = json.loads(lines[1])["previous"]
    path.write_text("\n".join([lines[0], canonical(middle), lines[2]]) + "\n")
    with pytest.raises(BrokenChain, match="line 2 is not an entry or was edited"):
        chain.verify()


def test_a_torn_last_line_is_dropped_with_a_note_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written(path, 3)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    again = Chain(path, purpose="journal")
    records = [e.record for e in again.entries()]
    assert [r["kind"] for r in records] == ["round", "round", "repair"]
    assert records[2]["bytes"] == len(content.splitlines(keepends=True)[2]) - 20
    again.append({"kind": "round", "round": 2})
    assert again.verify() == 4


def test_a_chain_cut_after_a_whole_line_is_found_by_whoever_kept_its_head(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    chain = written(path, 3)
    head = chain.head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert chain.verify() == 2  # the limit that the module's docstring states
    with pytest.raises(BrokenChain, match="cut off the end"):
        chain.verify(head=head)


def test_a_broken_chain_is_neither_opened_nor_extended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    chain = written(path, 3)
    path.write_text(path.read_text().replace('"round":1', '"round":11'))
    before = path.read_bytes()
    with pytest.raises(BrokenChain, match="line 2"):
        chain.append({"kind": "round"})
    with pytest.raises(BrokenChain, match="line 2"):
        Chain(path, purpose="journal")
    assert path.read_bytes() == before


def test_a_journal_does_not_pass_for_a_ledger(tmp_path: Path) -> None:
    written(tmp_path / "journal.jsonl", 2)
    with pytest.raises(BrokenChain, match="line 1 does not follow"):
        Chain(tmp_path / "journal.jsonl", purpose="ledger")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_refused_and_leaves_no_line(tmp_path: Path, value: float) -> None:
    chain = written(tmp_path / "journal.jsonl", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        chain.append({"loss": value})
    assert chain.verify() == 1


APPEND = """
import pathlib, sys
from privacy.chain import Chain
chain = Chain(pathlib.Path(sys.argv[1]), purpose="journal")
for number in range(50):
    chain.append({"writer": sys.argv[2], "number": number})
"""


def test_two_processes_write_one_chain_without_losing_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    root = Path(privacy.__file__).parents[1]
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(path), name], cwd=root) for name in ("a", "b")
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    records = [entry.record for entry in Chain(path, purpose="journal").entries()]
    for name in ("a", "b"):
        assert [r["number"] for r in records if r["writer"] == name] == list(range(50))
