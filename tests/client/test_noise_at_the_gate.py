"""Noise at the gate: as much as was promised, from a secret, once; killed anywhere, the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from client.books.answers import Answer, KeptAnswers
from client.declared import GateRefusal
from client.release import Gate
from federation.journal import Journal
from privacy.accounting import Mechanism
from privacy.chain import Chain
from privacy.ledger import AnsweredBefore, Ledger, Place
from privacy.promise import Promise

PLAN, ASKED, OTHER = "9f3c" * 16, "a5" * 32, "0f" * 32
BOUND, MULTIPLIER, PATIENTS = 2.0, 1.5, 8
CODE = Promise(
    kind="style_code",
    bound=BOUND,
    unit="patient",
    enforcement="check",
    mechanism=Mechanism(noise_multiplier=MULTIPLIER),
    delta=1e-5,
)
SUM = torch.linspace(-1.0, 1.0, 4000, dtype=torch.float64) / 20  # shorter than 8 bounds
FALSE_ALARM = 1e-6


def gate(folder: Path, question: str = ASKED, plan: str = PLAN) -> Gate:
    """The gate of a site that was just started."""
    ledger, journal = Ledger(folder / "ledger.jsonl"), Journal(folder / "journal.jsonl")
    place = Place(plan_sha256=plan, kind="style_code", round=0)
    return Gate(ledger.reserve(place, question, CODE), ledger, journal, KeptAnswers(folder / "answers"))


def released(at: Gate, total: torch.Tensor = SUM, **beside: Any) -> torch.Tensor:
    passed = at.release({"code": total}, {"code": tuple(total.shape)}, weight=float(PATIENTS), **beside)
    return passed.tensors["code"].double()


def secrets_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*.secret"))


def test_what_leaves_is_the_sum_with_the_promised_noise_and_no_key_stays(tmp_path: Path) -> None:
    noise = ((released(gate(tmp_path)) - SUM) / (BOUND * MULTIPLIER)).numpy()
    assert kstest(noise, "norm").pvalue > FALSE_ALARM
    assert secrets_in(tmp_path) == []
    (line,) = [e.record for e in Journal(tmp_path / "journal.jsonl").entries()]
    assert line["noise"] == "noise enters release: Gaussian, deviation 3"


def test_the_books_say_nothing_of_how_many_patients_are_behind_it(tmp_path: Path) -> None:
    released(gate(tmp_path))
    for book in ("journal.jsonl", "ledger.jsonl"):
        for entry in Chain(tmp_path / book, book.partition(".")[0]).entries():
            numbers = [v for v in entry.record.values() if isinstance(v, int | float)]
            assert PATIENTS not in numbers and PATIENTS * BOUND not in numbers
            assert float(SUM.norm()) not in numbers


def test_asked_again_the_same_bits_leave_and_another_question_has_other_noise(tmp_path: Path) -> None:
    first = released(gate(tmp_path))
    again = gate(tmp_path).again()
    assert again is not None and torch.equal(again.tensors["code"].double(), first)
    other = released(gate(tmp_path, plan="b" * 64))
    correlation = np.corrcoef((first - SUM).numpy(), (other - SUM).numpy())[0, 1]
    assert abs(correlation) < 5 / len(SUM) ** 0.5


def test_a_lost_answer_is_not_given_with_other_noise_even_by_a_site_that_lost_everything(
    tmp_path: Path,
) -> None:
    released(gate(tmp_path))
    for path in (tmp_path / "answers").rglob("*.safetensors"):
        path.unlink()
    fresh = gate(tmp_path)
    assert fresh.again() is None
    with pytest.raises(AnsweredBefore):
        released(fresh, anew=True)


@pytest.mark.parametrize(
    "beside",
    [
        {"counts": {"num_patients": 8}},
        {"metrics": {"seconds": 1.0}},
        {"not_covered": frozenset({"code"})},
    ],
)
def test_nothing_exact_leaves_beside_noise(tmp_path: Path, beside: dict[str, Any]) -> None:
    with pytest.raises(GateRefusal, match="nothing beside"):
        released(gate(tmp_path), **beside)
    assert Journal(tmp_path / "journal.jsonl").verify() == 0


def test_a_sum_that_was_not_bounded_where_it_was_made_stays_inside(tmp_path: Path) -> None:
    with pytest.raises(GateRefusal, match="over 8 contributors"):
        released(gate(tmp_path), torch.full((4,), BOUND * PATIENTS, dtype=torch.float64))


def test_a_site_without_patients_answers_with_noise_alone(tmp_path: Path) -> None:
    passed = gate(tmp_path).release({"code": torch.zeros(9)}, {"code": (9,)}, weight=0.0)
    assert float(passed.tensors["code"].abs().min()) > 0


class Killed(BaseException):
    """The process ends here."""


def dying(patch: pytest.MonkeyPatch, where: str) -> None:
    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    match where:
        case "before the key":
            patch.setattr(KeptAnswers, "secret", die)
        case "before the answer is kept":
            patch.setattr(KeptAnswers, "write", die)
        case "before the charge":
            patch.setattr(Ledger, "settle", die)
        case "before the line of the journal":
            patch.setattr(Journal, "append", die)
        case "before the key is removed":
            patch.setattr(KeptAnswers, "forget_secret", die)


@pytest.mark.parametrize(
    "where",
    [
        "before the key",
        "before the answer is kept",
        "before the charge",
        "before the line of the journal",
        "before the key is removed",
    ],
)
def test_killed_anywhere_the_site_gives_one_answer_and_is_charged_once(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    write = KeptAnswers.write

    def watched(self: KeptAnswers, place: Place, answer: Answer) -> None:
        drawn.append(answer.tensors["code"].double())
        write(self, place, answer)

    monkeypatch.setattr(KeptAnswers, "write", watched)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch, where)
        released(gate(tmp_path))
    restarted = gate(tmp_path)
    again = restarted.again()
    final = released(restarted) if again is None else again.tensors["code"].double()
    assert all(torch.equal(one, final) for one in drawn) and secrets_in(tmp_path) == []
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.spent().num_noised == 1 and ledger.open_reservations() == []
    assert not torch.equal(final, SUM)


def test_a_full_disk_that_keeps_no_answer_keeps_the_key_that_gives_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_is_kept(self: KeptAnswers, place: Place, answer: Answer) -> None:
        """As when the disk is full."""

    with monkeypatch.context() as patch:
        patch.setattr(KeptAnswers, "write", nothing_is_kept)
        first = released(gate(tmp_path))
    assert len(secrets_in(tmp_path)) == 1
    assert torch.equal(released(gate(tmp_path)), first)
    assert Ledger(tmp_path / "ledger.jsonl").spent().num_noised == 1
