"""Books that do not hold are found out; books that hold are not accused."""

from pathlib import Path

import pytest

from audit.books import number, read_books
from audit.evidence import SiteBooks
from federation.journal import Journal
from privacy.ledger import Ledger, Place, Reservation
from privacy.promise import Promise
from tests.audit.released import Answered, toy_plan


def promise(kind: str = "survey") -> Promise:
    return Promise(kind=kind, bound=1.0, unit="patient statistics", enforcement="check")


class Kept:
    """A ledger and a journal, written line by line."""

    def __init__(self, folder: Path) -> None:
        self.books = SiteBooks(folder / "journal.jsonl", folder / "ledger.jsonl")
        self.ledger, self.journal = Ledger(self.books.ledger), Journal(self.books.journal)

    def left(self, question: str = "a", sha256: str = "1" * 64, kind: str = "survey") -> Reservation:
        place = Place(plan_sha256="0" * 64, kind=kind, round=0)
        held = self.ledger.reserve(place, question, promise(kind))
        charge = self.ledger.settle(held, 10.0, sha256)
        self.journal.append({**place.record(), "question": question, "sha256": sha256, "ledger": charge})
        return held

    def problems(self) -> str:
        return " ".join(read_books(self.books).problems)


def test_books_of_a_site_that_answered_hold(tmp_path: Path) -> None:
    answered = Answered(tmp_path, 18, 3, toy_plan()).ask("survey", "probe", "erasure")
    read = read_books(answered.evidence().books["north"])
    assert read.problems == [] and len(read.released) == 3
    assert read.questions == {"survey": 1, "probe": 1, "erasure": 1}
    assert {kind: one.epsilon for kind, one in read.charged.items()} == dict.fromkeys(
        read.questions, float("inf")
    )


def test_a_ledger_that_forgets_a_round_is_found_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.left()
    kept.books.ledger.write_text("")
    assert "left, and the ledger does not know of it" in kept.problems()


@pytest.mark.parametrize("book", ["journal", "ledger"])
def test_an_edited_line_is_named_without_a_path(tmp_path: Path, book: str) -> None:
    kept = Kept(tmp_path)
    kept.left()
    path = tmp_path / f"{book}.jsonl"
    path.write_text(path.read_text().replace("survey", "nothing"))
    assert kept.problems().startswith(f"{book}.jsonl: line 1 is not an entry or was edited")


def test_a_journal_that_was_cut_is_found_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.left()
    path = kept.books.journal
    path.write_text(path.read_text()[:-20])
    assert "is cut off" in kept.problems()


def test_two_questions_under_one_place_are_found_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.left("a")
    line = kept.journal.entries()[0].record
    kept.journal.append({**line, "question": "b"})
    assert "2 different questions were answered for one place" in kept.problems()
    assert "on the charge of another question" in kept.problems()


def test_other_bytes_than_were_charged_are_found_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.left()
    kept.journal.append({**kept.journal.entries()[0].record, "sha256": "2" * 64})
    assert "other bytes than were charged" in kept.problems()
    assert "left twice for one question, differently" in kept.problems()


def test_a_release_after_the_ceiling_is_found_out(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.left()
    strict = SiteBooks(kept.books.journal, kept.books.ledger, ceiling=3.0)
    assert any("passes the site's ceiling of 3" in one for one in read_books(strict).problems)


def test_without_a_ledger_nothing_that_was_promised_can_be_checked(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.left()
    kept.books.ledger.unlink()
    assert kept.problems() == "There is no ledger.jsonl: what was promised cannot be checked."


def test_what_a_ledger_does_not_say_is_infinite() -> None:
    assert number("inf") == number(None) == number(-1.0) == number(True) == float("inf")
    assert number(2) == 2.0
