import math
from pathlib import Path

import pytest

from privacy.chain import BrokenChain, Chain, read_chain
from privacy.ledger import AnsweredBefore, Ceiling, Ledger, LedgerRefusal, Place, Reservation
from privacy.promise import Promise
from tests.worlds import unanswered_places

PLAN = "9f3c" * 16
UPDATE = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
SURVEY = Promise(kind="survey", bound=1.0, unit="patient statistics", enforcement="check")
ASKED = "a5" * 32
OTHER = "0f" * 32


def place(round_number: int, promise: Promise = UPDATE, part: str = "") -> Place:
    return Place(plan_sha256=PLAN, kind=promise.kind, round=round_number, part=part)


def test_a_reservation_without_a_settlement_stays_visible_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.settle(ledger.reserve(place(0, SURVEY), ASKED, SURVEY), 10.0, "aa")
    ledger.reserve(place(1), ASKED, UPDATE)
    assert unanswered_places(tmp_path / "ledger.jsonl") == [("round", 1)]


def test_the_same_reservation_twice_is_one_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first = ledger.reserve(place(1), ASKED, UPDATE)
    assert Ledger(tmp_path / "ledger.jsonl").reserve(place(1), ASKED, UPDATE) == first
    assert ledger.verify() == 1
    ledger.reserve(place(2), ASKED, UPDATE)
    assert ledger.verify() == 2


def test_the_same_bytes_are_charged_once_and_other_bytes_do_not_leave(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    reservation = ledger.reserve(place(1), ASKED, UPDATE)
    assert ledger.settled(reservation) is None
    assert ledger.settle(reservation, 20.0, "aa") == ledger.settle(reservation, 20.0, "aa")
    with pytest.raises(AnsweredBefore, match="this one is another"):
        ledger.settle(reservation, 20.0, "bb")
    assert ledger.verify() == 2
    settled = ledger.settled(reservation)
    assert settled is not None and settled.released == "aa"


def test_a_site_that_lost_what_left_answers_its_newest_place_anew_once_for_no_second_charge(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, second = (ledger.reserve(place(n), ASKED, UPDATE) for n in (1, 2))
    charge = ledger.settle(first, 20.0, "aa")
    assert ledger.settle(first, 20.0, "aa", anew=True) == charge  # the same is no other answer
    anew = ledger.settle(first, 20.0, "bb", anew=True)
    assert anew != charge and ledger.settle(first, 20.0, "bb") == anew
    settled = ledger.settled(first)
    assert settled is not None and (settled.entry, settled.released) == (anew, "bb")
    for released, lost in (("aa", False), ("aa", True), ("cc", True)):  # once, and the first is no more
        with pytest.raises(AnsweredBefore):
            ledger.settle(first, 20.0, released, anew=lost)
    with pytest.raises(AnsweredBefore):  # another question stays another one
        ledger.reserve(place(1), OTHER, UPDATE)
    ledger.settle(second, 20.0, "aa")
    ledger.settle(second, 20.0, "bb", anew=True)
    events = [entry.record["event"] for entry in read_chain(tmp_path / "ledger.jsonl", "ledger")]
    assert events == ["reserve", "reserve", "settle", "anew", "settle", "anew"]


def test_a_place_before_the_newest_is_not_answered_anew(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, second = (ledger.reserve(place(n), ASKED, UPDATE) for n in (1, 2))
    ledger.settle(first, 20.0, "aa")
    ledger.settle(second, 20.0, "aa")
    with pytest.raises(AnsweredBefore):
        ledger.settle(first, 20.0, "bb", anew=True)


def test_another_question_for_a_place_that_was_answered_is_refused_and_charged_nothing(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.settle(ledger.reserve(place(1), ASKED, UPDATE), 20.0, "aa")
    with pytest.raises(AnsweredBefore, match=r"'round' of round 1 of plan 9f3c9f3c…; got another"):
        ledger.reserve(place(1), OTHER, UPDATE)
    assert ledger.verify() == 2
    ledger.reserve(place(1), ASKED, UPDATE)  # the first question is no other
    ledger.reserve(place(2), OTHER, UPDATE)  # nor is another round, kind, part or plan the same place
    ledger.reserve(place(1, SURVEY), OTHER, SURVEY)
    ledger.reserve(place(1, UPDATE, "5"), OTHER, UPDATE)
    ledger.reserve(Place(plan_sha256="b" * 64, kind="round", round=1), OTHER, UPDATE)


def test_of_two_questions_for_one_place_the_first_that_is_answered_has_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    one = Ledger(path).reserve(place(1), ASKED, UPDATE)
    other = Ledger(path).reserve(place(1), OTHER, UPDATE)  # the first got no answer: its process was killed
    Ledger(path).settle(other, 20.0, "bb")
    with pytest.raises(AnsweredBefore):
        Ledger(path).settle(one, 20.0, "aa")
    assert unanswered_places(path) == [("round", 1)]
    assert Ledger(path).verify() == 3


def test_a_place_that_an_older_version_settled_without_its_question_is_given_away(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    old = {"event": "reserve", "plan": PLAN, "round": 1, "kind": "round", "promise": "…", "epsilon": "inf"}
    chain = Chain(path, "ledger")
    chain.append({"event": "settle", "reservation": chain.append(old), "released": "aa"})
    with pytest.raises(AnsweredBefore):
        Ledger(path).reserve(place(1), ASKED, UPDATE)


def test_a_site_with_a_finite_ceiling_refuses_and_writes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", Ceiling(epsilon=3.0))
    with pytest.raises(LedgerRefusal, match=r"Plan 9f3c9f3c… .*ceiling is 3 .*Nothing was read"):
        ledger.reserve(place(1), ASKED, UPDATE)
    assert ledger.verify() == 0


def test_a_release_without_a_reservation_of_this_ledger_is_not_settled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    elsewhere = Ledger(tmp_path / "other.jsonl").reserve(place(1), ASKED, UPDATE)
    settled = ledger.settle(ledger.reserve(place(2), ASKED, UPDATE), 1.0, "aa")
    for false in (elsewhere, Reservation(place(2), ASKED, UPDATE, settled)):
        with pytest.raises(ValueError, match="reserve before reading"):
            ledger.settle(false, 1.0, "aa")


def test_an_edited_ledger_reserves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.reserve(place(1), ASKED, UPDATE)
    path.write_text(path.read_text().replace('"round":1', '"round":7'))
    with pytest.raises(BrokenChain, match="line 1"):
        ledger.reserve(place(2), ASKED, UPDATE)


@pytest.mark.parametrize("ceiling", [-1.0, math.nan])
def test_a_ceiling_that_is_no_ceiling_is_refused(ceiling: float) -> None:
    with pytest.raises(ValueError, match="epsilon_ceiling"):
        Ceiling(epsilon=ceiling)
