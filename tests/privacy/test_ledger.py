import math
from pathlib import Path

import pytest

from privacy.chain import BrokenChain
from privacy.ledger import Ledger, LedgerRefusal, Open, Reservation
from privacy.promise import Promise

PLAN = "9f3c" * 16
UPDATE = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
SURVEY = Promise(kind="survey", bound=1.0, unit="patient statistics", enforcement="check")


def test_a_reservation_without_a_settlement_stays_visible_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.settle(ledger.reserve(PLAN, 0, SURVEY), 10.0, "aa")
    ledger.reserve(PLAN, 1, UPDATE)
    assert Ledger(tmp_path / "ledger.jsonl").open_reservations() == [Open(PLAN, 1, "round")]


def test_the_same_reservation_twice_is_one_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first = ledger.reserve(PLAN, 1, UPDATE)
    assert Ledger(tmp_path / "ledger.jsonl").reserve(PLAN, 1, UPDATE) == first
    assert ledger.verify() == 1
    ledger.reserve(PLAN, 2, UPDATE)
    assert ledger.verify() == 2


def test_the_same_bytes_are_charged_once_and_other_bytes_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    reservation = ledger.reserve(PLAN, 1, UPDATE)
    assert ledger.settle(reservation, 20.0, "aa") == ledger.settle(reservation, 20.0, "aa")
    assert ledger.verify() == 2
    ledger.settle(reservation, 20.0, "bb")
    assert ledger.verify() == 3


def test_a_site_with_a_finite_ceiling_refuses_and_writes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", epsilon_ceiling=3.0)
    with pytest.raises(LedgerRefusal, match=r"Plan 9f3c9f3c… .*ceiling is 3 .*Nothing was read"):
        ledger.reserve(PLAN, 1, UPDATE)
    assert ledger.verify() == 0


def test_a_release_without_a_reservation_of_this_ledger_is_not_settled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    elsewhere = Ledger(tmp_path / "other.jsonl").reserve(PLAN, 1, UPDATE)
    settled = ledger.settle(ledger.reserve(PLAN, 2, UPDATE), 1.0, "aa")
    for false in (elsewhere, Reservation(PLAN, 2, UPDATE, settled)):
        with pytest.raises(ValueError, match="reserve before reading"):
            ledger.settle(false, 1.0, "aa")


def test_what_was_spent_is_nothing_before_the_first_release_and_infinite_after_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    reservation = ledger.reserve(PLAN, 1, UPDATE)
    assert ledger.epsilon_spent() == 0.0
    ledger.settle(reservation, 20.0, "aa")
    assert ledger.epsilon_spent() == math.inf


def test_an_edited_ledger_reserves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.reserve(PLAN, 1, UPDATE)
    path.write_text(path.read_text().replace('"round":1', '"round":7'))
    with pytest.raises(BrokenChain, match="line 1"):
        ledger.reserve(PLAN, 2, UPDATE)


@pytest.mark.parametrize("ceiling", [-1.0, math.nan])
def test_a_ceiling_that_is_no_ceiling_is_refused(tmp_path: Path, ceiling: float) -> None:
    with pytest.raises(ValueError, match="epsilon_ceiling"):
        Ledger(tmp_path / "ledger.jsonl", epsilon_ceiling=ceiling)
