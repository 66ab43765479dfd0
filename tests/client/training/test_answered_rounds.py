"""A round that was answered: the same question, the same bytes; another question, none."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from federation.exchanges.pretraining import TrainAsk
from federation.plan.plan import RunPlan
from privacy.ledger import AnsweredBefore
from tests.client.training.killed_site import PATIENTS, Killed, ToySite, alike, same


@pytest.mark.parametrize("round_number", [1, 2])
def test_asked_again_when_it_was_done_the_site_answers_the_same_without_a_step(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan, round_number: int
) -> None:
    first = site()
    for number in range(1, round_number + 1):
        expected = first.answer(ask(plan, number), plan)
    left = {path: path.read_bytes() for path in (first.state_dir / "state").rglob("*") if path.is_file()}
    charged = first.ledger.verify()
    again = site()
    came = again.answer(ask(plan, round_number), plan)
    assert again.steps == []
    assert same(came.tensors, expected.tensors) and came.metrics == expected.metrics
    assert came.counts == expected.counts
    assert again.ledger.verify() == charged
    assert again.journal.verify() == round_number + 1  # what crossed twice is written twice
    for path, content in left.items():
        assert path.read_bytes() == content
    whole, following = site("whole"), round_number + 1
    for number in range(1, following + 1):
        expected = whole.answer(ask(plan, number), plan)
    assert alike(whole, again, plan, (expected, again.answer(ask(plan, following), plan)), following)


@pytest.mark.parametrize("what", ["shared", "bank"])
def test_a_round_that_was_answered_is_answered_to_no_other_question(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan, what: str
) -> None:
    site().answer(ask(plan), plan)
    site().answer(ask(plan, 2), plan)
    shared = dict(ask(plan).shared)
    if what == "shared":
        shared["embed.bias"] = shared["embed.bias"] + 1e-3
    again = site()
    with pytest.raises(AnsweredBefore, match="of round 2 of plan"):
        again.answer(ask(plan, 2, shared, ("north", "south") if what == "bank" else None), plan)
    assert again.steps == [] and again.ledger.verify() == 4 and again.journal.verify() == 2


def test_ten_sets_of_weights_for_one_round_are_one_answer(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan
) -> None:
    """Ten updates from ten points are what an inversion of gradients asks for."""
    answers = []
    for number in range(10):
        shared = {name: tensor + 1e-3 * number for name, tensor in ask(plan).shared.items()}
        try:
            answers.append(site().answer(ask(plan, shared=shared), plan))
        except AnsweredBefore:
            continue
    assert len(answers) == 1 and site().ledger.verify() == 2
    a_new_plan = replace(plan, name="another agreement")
    site().answer(ask(a_new_plan), a_new_plan)
    assert site().ledger.verify() == 4  # is a question of its own, and charged


@pytest.mark.parametrize("what", ["damaged", "cohort"])
def test_an_answer_that_left_leaves_again_whatever_the_cohort_is_now(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan, what: str
) -> None:
    expected = site().answer(ask(plan), plan)
    (path,) = site().state_dir.rglob("answers/*/round-0001.safetensors")
    if what == "damaged":
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    again = site("a", [*PATIENTS[:-1], "new"] if what == "cohort" else PATIENTS)
    came = again.answer(ask(plan), plan)
    assert again.steps == ([1, 2, 3] if what == "damaged" else [])
    assert same(came.tensors, expected.tensors) and came.record == expected.record
    assert again.ledger.verify() == 2


def test_a_damaged_answer_of_a_cohort_that_is_gone_leaves_no_more(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan
) -> None:
    site().answer(ask(plan), plan)
    (path,) = site().state_dir.rglob("answers/*/round-0001.safetensors")
    path.unlink()
    again = site("a", [*PATIENTS[:-1], "new"])
    with pytest.raises(AnsweredBefore, match="other scans"):
        again.answer(ask(plan), plan)
    assert again.journal.verify() == 1 and again.ledger.verify() == 2


def test_an_answer_that_finds_no_room_costs_no_round(
    site: Callable[..., ToySite],
    ask: Callable[..., TrainAsk],
    plan: RunPlan,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "client"):
        patch.setattr("client.books.answers.save_weights", full)
        expected = site().answer(ask(plan), plan)
    assert "round-0001.safetensors could not be written" in caplog.text
    again = site()
    assert same(again.answer(ask(plan), plan).tensors, expected.tensors) and again.steps == [1, 2, 3]


@pytest.mark.parametrize("where", ["state", "answer", "charge", "line"])
def test_killed_anywhere_on_its_way_out_a_round_ends_in_the_same_bits_and_is_charged_once(
    site: Callable[..., ToySite],
    ask: Callable[..., TrainAsk],
    plan: RunPlan,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(*given: Any, **named: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        module, name = {
            "state": ("client.training.site_state.StateFolder", "save"),
            "answer": ("client.books.answers.KeptAnswers", "write"),
            "charge": ("privacy.ledger.Ledger", "settle"),
            "line": ("federation.journal.Journal", "append"),
        }[where]
        patch.setattr(f"{module}.{name}", die)
        with pytest.raises(Killed):
            site("killed").answer(ask(plan), plan)
    whole, again = site("whole"), site("killed")
    expected, came = whole.answer(ask(plan), plan), again.answer(ask(plan), plan)
    assert alike(whole, again, plan, (expected, came), 1)
    assert (again.ledger.verify(), again.journal.verify()) == (2, 1)
    for number in (2, 3):
        expected, came = whole.answer(ask(plan, number), plan), again.answer(ask(plan, number), plan)
    assert alike(whole, again, plan, (expected, came), 3)
