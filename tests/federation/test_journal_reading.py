"""Reading a journal finds every edit, removal and reordering, and writes nothing."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import client.cli
import server.cli
from federation.exchanges.pretraining import PRETRAINING, TrainReply
from federation.journal import Journal, journal_lines, read_journal
from federation.reply_book import ReplyBook
from meduet_models.weights import sha256_of_tensors
from privacy.chain import BrokenChain
from privacy.ledger import Ledger, Place
from privacy.promise import Promise


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(5):
        journal.append({"kind": "round", "plan": "ab" * 32, "round": number, "bytes": 10 * number})
    return journal.path


Tamper = Callable[[list[str]], list[str]]
TAMPERED: dict[str, tuple[Tamper, int]] = {
    "an edit": (lambda lines: [line.replace('"bytes":20', '"bytes":21') for line in lines], 3),
    "another spelling": (lambda lines: [line.replace('"bytes":20', '"bytes": 20') for line in lines], 3),
    "a removal": (lambda lines: lines[:1] + lines[2:], 2),
    "the first line's removal": (lambda lines: lines[1:], 1),
    "a reordering": (lambda lines: [lines[i] for i in (0, 2, 1, 3, 4)], 2),
    "a repetition": (lambda lines: [*lines, lines[4]], 6),
    "a line of one's own": (lambda lines: [*lines, "{}\n"], 6),
    "a torn end": (lambda lines: [*lines, '{"index":5'], 6),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_any_tampering_is_found_with_its_line_and_nothing_is_written(path: Path, how: str) -> None:
    tamper, line = TAMPERED[how]
    path.write_text("".join(tamper(path.read_text().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(BrokenChain, match=rf"journal\.jsonl: line {line} "):
        read_journal(path)
    assert path.read_bytes() == before


def test_lines_cut_off_the_end_show_against_a_hash_kept_elsewhere(path: Path) -> None:
    head = read_journal(path)[-1].sha256
    Journal(path).append({"kind": "round", "round": 5})
    assert len(read_journal(path, head)) == 6  # what came later is no harm
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    assert len(read_journal(path)) == 4
    with pytest.raises(BrokenChain, match="cut off the end"):
        read_journal(path, head)


def test_a_journal_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a journal at"):
        read_journal(tmp_path / "journal.jsonl")
    assert not (tmp_path / "journal.jsonl").exists()


def test_the_journal_reads_as_one_line_per_entry(path: Path) -> None:
    lines = list(journal_lines(read_journal(path)))
    assert len(lines) == 5
    assert lines[2].split()[0] == "3" and lines[2].endswith("round       plan=abababababab… round=2 bytes=20")
    assert all('"plan": "abab' in line for line in journal_lines(read_journal(path), full=True))


def test_a_reply_is_noted_with_hash_norm_and_size_as_it_travelled(tmp_path: Path) -> None:
    update = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    reply = TrainReply(
        plan_sha256="0" * 64, site="north", round=2, examples=8, update=update, wire_dtype="bfloat16"
    )
    book = ReplyBook(Journal(tmp_path / "journal.jsonl"))
    draft = book.draft(PRETRAINING.route, reply)
    assert read_journal(tmp_path / "journal.jsonl") == []  # a draft is not an entry
    update["a"] += 1.0
    book.enter(draft)
    (entry,) = read_journal(tmp_path / "journal.jsonl")
    expected = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    assert entry.record == {
        "kind": "reply", "to": "train.round", "plan": "0" * 64, "site": "north", "round": 2, "examples": 8,
        "tensors": 2, "bytes": 6, "sha256": sha256_of_tensors(expected), "norm": 5.0,
    }  # fmt: skip


def test_both_sides_type_the_same_and_a_site_also_checks_its_ledger(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server.cli.main(["journal", "verify", str(tmp_path)]) == 0
    head = read_journal(path)[-1].sha256
    assert head in capsys.readouterr().out
    assert server.cli.main(["journal", "verify", str(tmp_path), "--head", head]) == 0
    assert server.cli.main(["journal", "verify", str(tmp_path), "--head", "0" * 64]) == 2
    assert server.cli.main(["journal", "show", str(tmp_path)]) == 0
    assert "round=4" in capsys.readouterr().out

    state = tmp_path / "state"
    ledger = Ledger(state / "ledger.jsonl")
    promise = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
    charge = ledger.settle(
        ledger.reserve(Place(plan_sha256="0" * 64, kind="round", round=1), "2" * 64, promise), 1.0, "1" * 64
    )
    Journal(state / "journal.jsonl").append({"kind": "round", "ledger": charge})
    (tmp_path / "site.yaml").write_text("name: north\ndata_root: absent\nstate_dir: state\n")

    def site(*typed: str) -> tuple[int, str]:
        screen = io.StringIO()
        typed = ("journal", *typed, "--config", str(tmp_path / "site.yaml"))
        return client.cli.main(typed, Console(file=screen, width=300)), screen.getvalue()

    assert site("verify")[0] == 0 and site("show", "--full")[0] == 0
    lines = (state / "ledger.jsonl").read_text().splitlines(keepends=True)
    (state / "ledger.jsonl").write_text("".join(lines[:-1]))
    status, said = site("verify")
    assert status == 1 and "journal line 1 names" in said
    (state / "journal.jsonl").unlink()
    assert site("verify")[0] == site("show")[0] == 2
