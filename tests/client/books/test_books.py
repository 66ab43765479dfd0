"""A site's books are held against each other: an older one that was put back does not pass for whole."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from client.books.books import open_books, read_books
from client.consent.approvals import Approvals
from client.exchanges.exchange import AskRefused
from client.settings import SiteConfig
from client.site import Site
from federation.bundle import running_bundle
from federation.journal import Journal
from federation.published_plan import PublishedPlan
from federation.wire.wire import RefusalKind
from privacy.chain import BrokenChain
from privacy.ledger import Ledger, Place
from privacy.promise import Promise

PLAN = "ab" * 32
PROMISE = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")


def answer(state: Path, round_number: int, journal: bool = True) -> None:
    """What a site writes for a round, in its order."""
    ledger = Ledger(state / "ledger.jsonl")
    place = ledger.reserve(Place(plan_sha256=PLAN, kind="round", round=round_number), "a5" * 32, PROMISE)
    charge = ledger.settle(place, 1.0, f"{round_number:064x}")
    if journal:
        Journal(state / "journal.jsonl").append({"kind": "round", "round": round_number, "ledger": charge})
    done = state / "state" / PLAN[:12] / f"round-{round_number:04d}.safetensors"
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_bytes(b"")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for round_number in (1, 2):
        answer(tmp_path, round_number)
    (tmp_path / "state" / PLAN[:12] / "round-0000.safetensors").write_bytes(b"")
    return tmp_path


def shorten(path: Path, lines: int) -> None:
    """What an older backup looks like."""
    kept = path.read_text().splitlines(keepends=True)[:lines]
    path.write_text("".join(kept))


def test_books_that_were_written_together_agree(state: Path) -> None:
    for books in (read_books(state), open_books(state)):
        assert (len(books.ledger), len(books.journal), books.unnamed) == (4, 2, 0)


def test_a_place_in_the_ledger_without_anything_that_left_is_no_fault(state: Path) -> None:
    Ledger(state / "ledger.jsonl").reserve(Place(plan_sha256=PLAN, kind="round", round=3), "a5" * 32, PROMISE)
    assert read_books(state).unnamed == 0


def test_an_older_ledger_is_refused_because_the_journal_knows_more(state: Path) -> None:
    shorten(state / "ledger.jsonl", 2)
    for look in (read_books, open_books):
        with pytest.raises(
            BrokenChain, match=r"ledger\.jsonl: expected the charge that journal line 2 names"
        ):
            look(state)


def test_older_books_are_refused_because_the_states_of_training_know_more(state: Path) -> None:
    shorten(state / "ledger.jsonl", 2)
    shorten(state / "journal.jsonl", 1)
    with pytest.raises(BrokenChain, match=r"expected the place of round 2 of plan abababababab"):
        read_books(state)


def test_books_and_states_that_were_all_put_back_pass_and_a_hash_kept_elsewhere_does_not(
    state: Path,
) -> None:
    head = Journal(state / "journal.jsonl").head
    assert read_books(state, head).unnamed == 0
    shorten(state / "ledger.jsonl", 2)
    shorten(state / "journal.jsonl", 1)
    (state / "state" / PLAN[:12] / "round-0002.safetensors").unlink()
    assert len(read_books(state).journal) == 1  # what the runbook says of it
    with pytest.raises(BrokenChain, match="lines were cut off the end"):
        read_books(state, head)


def test_an_older_journal_leaves_charges_that_it_does_not_name(state: Path) -> None:
    answer(state, 3, journal=False)
    assert read_books(state).unnamed == 1


def test_a_line_torn_by_a_crash_is_repaired_before_a_start_and_only_named_when_read(state: Path) -> None:
    with (state / "journal.jsonl").open("a") as file:
        file.write('{"index":2,')
    with pytest.raises(BrokenChain, match="line 3 is cut off"):
        read_books(state)
    assert len(open_books(state).journal) == 3  # the third says that a line was dropped
    assert len(read_books(state).journal) == 3


def test_a_site_that_never_answered_has_empty_books(tmp_path: Path) -> None:
    assert open_books(tmp_path).ledger == []
    with pytest.raises(ValueError, match="Expected a journal at"):
        read_books(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "lost", [("ledger.jsonl",), ("ledger.jsonl", "journal.jsonl"), ("ledger.jsonl", "journal.jsonl", "state")]
)
def test_a_site_whose_ledger_is_lost_does_not_open_as_if_nothing_had_been_spent(
    state: Path, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    kept = state / "answers" / PLAN[:12] / "round-0002.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    config = SiteConfig(name="north", data_root=tmp_path.parent / "scans", state_dir=state, device="cpu")
    Site(config)
    for name in lost:
        path = state / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(BrokenChain, match="ledger"):
        Site(config)


def test_a_site_that_lost_its_whole_folder_answers_nothing_before_its_people_approve_again(
    tmp_path: Path, toy_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Site, "fits", lambda self, plan: None)
    config = SiteConfig(
        name="north", data_root=tmp_path / "scans", state_dir=tmp_path / "state", device="cpu"
    )
    plan = toy_plan()
    config.state_dir.mkdir()
    Approvals(config.state_dir).approve(PublishedPlan(plan=plan, bundle_sha256=running_bundle()))
    Site(config).accept(plan)
    shutil.rmtree(config.state_dir)
    with pytest.raises(AskRefused) as raised:
        Site(config).accept(plan)
    assert raised.value.kind is RefusalKind.PLAN_NOT_ACCEPTED
