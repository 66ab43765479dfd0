"""The ledger under noise: what it adds up, what it refuses, and what a kill leaves of it."""

import math
from pathlib import Path

import pytest

from privacy.accounting import Mechanism, gaussian_multiplier
from privacy.chain import Chain
from privacy.ledger import AnsweredBefore, Ceiling, Ledger, LedgerRefusal, Place
from privacy.promise import Promise

NOISE = Mechanism(noise_multiplier=gaussian_multiplier(3.0, 1e-5))
CODE = Promise(kind="style_code", bound=2.0, unit="patient", enforcement="check", mechanism=NOISE, delta=1e-5)
PLAIN = Promise(kind="round", bound=1.0, unit="site update", enforcement="clip")
ASKED, OTHER = "a5" * 32, "0f" * 32


def place(plan: str = "a", promise: Promise = CODE) -> Place:
    return Place(plan_sha256=plan * 64, kind=promise.kind, round=0)


def ledger_at(path: Path, epsilon: float = math.inf) -> Ledger:
    return Ledger(path / "ledger.jsonl", Ceiling(epsilon=epsilon))


def test_two_surveys_by_two_plans_are_added_up_and_the_third_meets_the_ceiling(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, 5.0)
    for plan in "ab":
        ledger.settle(ledger.reserve(place(plan), ASKED, CODE), 1.0, "aa")
    total = ledger.spent().total.upper
    assert 3.0 < total < 5.0  # composed, not summed
    with pytest.raises(LedgerRefusal, match=r"epsilon 3 .*that makes 5\.\d+, .*ceiling is 5 "):
        ledger.reserve(place("c"), ASKED, CODE)
    assert ledger.verify() == 4


def test_an_open_reservation_counts_in_full_until_somebody_says_that_nothing_left(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, 3.0)
    reservation = ledger.reserve(place("a"), ASKED, CODE)
    assert ledger.reserve(place("a"), ASKED, CODE) == reservation  # the same question is charged once
    with pytest.raises(LedgerRefusal):
        ledger.reserve(place("b"), ASKED, CODE)
    (line,) = ledger.open_reservations()
    ledger.close(line.index, "the machine was off, the centre has nothing")
    assert ledger.open_reservations() == [] and ledger.spent().total.upper == 0.0
    ledger.reserve(place("b"), ASKED, CODE)
    with pytest.raises(AnsweredBefore, match="this site closed it"):
        ledger.settle(reservation, 1.0, "aa")


def test_a_closed_question_that_is_asked_again_is_a_new_reservation(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path, 3.0)
    first = ledger.reserve(place(), ASKED, CODE)
    ledger.close(0, "nothing left")
    again = ledger.reserve(place(), ASKED, CODE)
    assert again.entry != first.entry and ledger.spent().num_noised == 1
    ledger.settle(again, 1.0, "aa")


@pytest.mark.parametrize(
    ("index", "reason", "sentence"),
    [
        (0, "why not", "that of 0 left"),
        (1, "why not", "line 1 is none"),
        (7, "why not", "line 7 is none"),
        (-1, "why not", "line -1 is none"),
        (2, " ", "Expected a reason"),
        (4, "why not", "line 4 is none"),
        (3, "why not", "closed before"),
    ],
)
def test_only_an_open_reservation_is_closed_and_not_without_a_reason(
    tmp_path: Path, index: int, reason: str, sentence: str
) -> None:
    ledger = ledger_at(tmp_path)
    ledger.settle(ledger.reserve(place("a"), ASKED, CODE), 1.0, "aa")
    ledger.reserve(place("b"), ASKED, CODE)
    ledger.reserve(place("c"), ASKED, CODE)
    ledger.close(3, "nothing left")
    before = ledger.verify()
    with pytest.raises(ValueError, match=sentence):
        ledger.close(index, reason)
    assert ledger.verify() == before


def test_under_a_ceiling_nothing_without_noise_is_reserved_and_what_was_makes_it_infinite(
    tmp_path: Path,
) -> None:
    with pytest.raises(LedgerRefusal, match="without noise, at epsilon infinity; this site's ceiling is 3"):
        ledger_at(tmp_path, 3.0).reserve(place(promise=PLAIN), ASKED, PLAIN)
    free = ledger_at(tmp_path)
    free.reserve(place(), ASKED, CODE)
    free.reserve(place(promise=PLAIN), ASKED, PLAIN)
    spent = free.spent()
    assert spent.total.upper == math.inf and 2.9 < spent.noised.upper <= 3.0
    assert (spent.num_plain, spent.num_noised) == (1, 1)
    with pytest.raises(LedgerRefusal, match="makes inf"):  # the ceiling came after the consent
        ledger_at(tmp_path, 100.0).reserve(place("b"), ASKED, CODE)


def test_a_lower_delta_of_the_site_makes_the_same_noise_cost_more(tmp_path: Path) -> None:
    strict = Ledger(tmp_path / "ledger.jsonl", Ceiling(epsilon=3.0, delta=1e-7))
    with pytest.raises(LedgerRefusal, match=r"epsilon 3\.\d+ \(delta 1e-07\)"):
        strict.reserve(place(), ASKED, CODE)


def test_what_left_with_noise_leaves_with_no_other_noise_even_when_all_was_lost(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    reservation = ledger.reserve(place(), ASKED, CODE)
    ledger.settle(reservation, 1.0, "aa")
    assert ledger.settle(reservation, 1.0, "aa", anew=True)
    with pytest.raises(AnsweredBefore, match="this one is another"):
        ledger.settle(reservation, 1.0, "bb", anew=True)


def test_another_question_for_the_same_place_is_charged_beside_the_first(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.reserve(place(), ASKED, CODE)
    ledger.reserve(place(), OTHER, CODE)
    assert ledger.spent().num_noised == 2


@pytest.mark.parametrize("changes", [{"epsilon": -1.0}, {"epsilon": math.nan}, {"delta": 1e-3}])
def test_a_ceiling_that_is_none_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="ceiling"):
        Ceiling(**changes)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("write", [1, 2])
@pytest.mark.parametrize("where", ["before", "torn", "after"])
def test_after_a_kill_at_any_write_the_sum_is_at_least_what_left(
    tmp_path: Path, write: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    done, whole = 0, Chain._write

    def dying(self: Chain, descriptor: int, record: dict[str, object]) -> str:
        nonlocal done
        done += 1
        if done != write:
            return whole(self, descriptor, record)
        if where == "before":
            raise Killed
        whole(self, descriptor, record)
        if where == "torn":
            content = self.path.read_bytes()
            self.path.write_bytes(content[:-5])
        raise Killed

    def answer(ledger: Ledger) -> None:
        reservation = ledger.reserve(place(), ASKED, CODE)
        if ledger.settled(reservation) is None:
            ledger.settle(reservation, 1.0, "aa")
        left.append("aa")

    ledger = ledger_at(tmp_path, 3.0)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Chain, "_write", dying)
        answer(ledger)
    assert len(left) <= ledger_at(tmp_path, 3.0).spent().num_noised
    answer(ledger_at(tmp_path, 3.0))  # asked again
    spent = ledger_at(tmp_path, 3.0).spent()
    assert left == ["aa"] and spent.num_noised == 1 and 2.9 < spent.total.upper <= 3.0


def test_ten_thousand_lines_are_read_and_composed_in_seconds(tmp_path: Path) -> None:
    import time

    from forms.json_text import canonical
    from privacy.chain import _genesis, sha256_of

    small = Mechanism(noise_multiplier=500.0).record()
    previous, lines = _genesis("ledger"), []
    for index in range(10_000):
        body = {
            "index": index, "utc": "2026-01-01T00:00:00.000+00:00", "previous": previous,
            "record": {"event": "reserve", "plan": f"{index:064d}", "kind": "style_code", "round": 0,
                       "question": ASKED, "mechanism": small},
        }  # fmt: skip
        previous = sha256_of(canonical(body))
        lines.append(canonical({**body, "sha256": previous}))
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    ledger = ledger_at(tmp_path, 9.0)
    ledger.spent()
    began = time.process_time()
    spent = ledger.spent()
    ledger.reserve(place(), ASKED, CODE)
    assert time.process_time() - began < 6.0
    assert spent.num_noised == 10_000 and 0.5 < spent.total.upper < 1.0
