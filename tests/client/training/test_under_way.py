"""A round that is killed in the middle goes on where it was, to the bits of one that never was."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.training.site_state import SiteState, StateFolder, UnderWay, cohort_sha256
from federation.exchanges.pretraining import TrainAsk
from federation.journal import Journal
from federation.plan.plan import RunPlan, TrainingPlan
from meduet_models.objective.settings import ObjectiveConfig
from tests.client.training.killed_site import PATIENTS, STEPS, Killed, Tensors, ToySite, alike, same


@pytest.mark.parametrize("round_number", [1, 2])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_after_any_step_a_round_ends_in_the_bits_of_one_that_was_not(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan, round_number: int, step: int
) -> None:
    whole = site("whole", progress_every_s=30.0)
    for number in range(1, round_number + 1):
        expected = whole.answer(ask(plan, number), plan)
    killed = site("killed")
    for number in range(1, round_number):
        killed.answer(ask(plan, number), plan)
    with pytest.raises(Killed):
        killed.answer(ask(plan, round_number), plan, kill_after=step)
    assert f"round-{round_number:04d}.partial.safetensors" in killed.left()
    again = site("killed")  # nothing but the disk
    came = again.answer(ask(plan, round_number), plan)
    assert again.steps == list(range(step + 1, STEPS + 1))  # what was done is not done again
    assert alike(whole, again, plan, (expected, came), round_number)
    assert whole.left() == again.left() and not [name for name in again.left() if "partial" in name]
    assert (
        len(Journal(again.state_dir / "journal.jsonl").entries()) == round_number
    )  # the gate was passed once
    assert again.ledger.verify() == whole.ledger.verify()


def test_killed_after_every_step_it_is_still_the_same(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], alone_plan: RunPlan
) -> None:
    whole = site("whole")
    expected = whole.answer(ask(alone_plan), alone_plan)
    for step in range(1, alone_plan.training.steps_per_round + 1):
        with pytest.raises(Killed):
            site("killed").answer(ask(alone_plan), alone_plan, kill_after=step)
    again = site("killed")
    assert alike(whole, again, alone_plan, (expected, again.answer(ask(alone_plan), alone_plan)), 1)
    assert again.steps == []


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_where_masked_steps_give_way_to_all_terms_it_is_still_the_same(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], toy_plan: Any, step: int
) -> None:
    plan = toy_plan(
        objective=ObjectiveConfig(masked_share=0.5),
        training=TrainingPlan(rounds=1, steps_per_round=STEPS, batch_size=4, optimiser="muon"),
    )
    whole, killed = site("whole"), site("killed")
    expected = whole.answer(ask(plan), plan)
    with pytest.raises(Killed):
        killed.answer(ask(plan), plan, kill_after=step)
    again = site("killed")
    assert alike(whole, again, plan, (expected, again.answer(ask(plan), plan)), 1)
    assert again.steps == list(range(step + 1, STEPS + 1))


@pytest.mark.parametrize("what", ["shared", "bank", "cohort", "state", "round"])
def test_another_question_begins_the_round_anew(
    site: Callable[..., ToySite],
    ask: Callable[..., TrainAsk],
    plan: RunPlan,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def question(round_number: int = 2, other: bool = False) -> TrainAsk:
        shared = dict(ask(plan).shared)
        if other and what == "shared":
            shared["embed.bias"] = shared["embed.bias"] + 1e-3
        return ask(plan, round_number, shared, ("north", "south") if other and what == "bank" else None)

    patients = [*PATIENTS[:-1], "new"] if what == "cohort" else PATIENTS
    first, whole = site("killed"), site("whole", patients)
    first.answer(question(1), plan)
    with pytest.raises(Killed):
        first.answer(question(), plan, kill_after=2)
    folder = StateFolder(first.state_dir / "state", plan.sha256)
    if what == "state":
        begun = folder.before(2)
        folder._write(SiteState(round=1, home=begun.home, teacher=begun.teacher), "aa")
    if what == "round":
        (path,) = first.state_dir.rglob("*.partial.safetensors")
        path.rename(path.with_name("round-0003.partial.safetensors"))
    round_number = 3 if what == "round" else 2
    (whole.state_dir / "state").mkdir(parents=True)
    for path in (first.state_dir / "state").rglob("*.safetensors"):
        if "partial" not in path.name:
            target = whole.state_dir / "state" / path.relative_to(first.state_dir / "state")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    expected = whole.answer(question(round_number, other=True), plan)
    again = site("killed", patients)
    with caplog.at_level(logging.WARNING, "client"):
        came = again.answer(question(round_number, other=True), plan)
    assert again.steps == [1, 2, 3]
    assert alike(whole, again, plan, (expected, came), round_number)
    assert "begins anew" in caplog.text
    assert not [name for name in again.left() if "partial" in name]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_round_under_way_is_removed_and_the_round_begins_anew(
    site: Callable[..., ToySite],
    ask: Callable[..., TrainAsk],
    plan: RunPlan,
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = (whole := site("whole")).answer(ask(plan), plan)
    with pytest.raises(Killed):
        site("killed").answer(ask(plan), plan, kill_after=2)
    again = site("killed")
    (path,) = again.state_dir.rglob("*.partial.safetensors")
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 64
    (state,) = again.state_dir.rglob("round-0000.safetensors")
    path.write_bytes(
        {"cut": content[:-9], "flipped": bytes(flipped), "empty": b"", "foreign": state.read_bytes()}[how]
    )
    with caplog.at_level(logging.WARNING, "client"):
        came = again.answer(ask(plan), plan)
    assert again.steps == [1, 2, 3] and "begins anew" in caplog.text
    assert alike(whole, again, plan, (expected, came), 1)


def test_a_round_that_is_shorter_than_the_interval_writes_nothing(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan
) -> None:
    quick = site(progress_every_s=30.0)
    with pytest.raises(Killed):
        quick.answer(ask(plan), plan, kill_after=STEPS)
    assert quick.left() == ["round-0000.safetensors"]


def test_what_a_kill_in_the_middle_of_a_write_leaves_goes_with_the_round(
    site: Callable[..., ToySite], ask: Callable[..., TrainAsk], plan: RunPlan
) -> None:
    one = site()
    one.answer(ask(plan), plan)
    (state,) = one.state_dir.rglob("state/*/round-0001.safetensors")
    (state.parent / ".round-0002.partial.safetensors.x7").write_bytes(b"half")
    one.answer(ask(plan, 2), plan)
    assert one.left() == [f"round-000{n}.safetensors" for n in (0, 1, 2)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def tensors() -> Tensors:
    return {"weight": torch.arange(3.0)}


def test_it_is_written_when_the_interval_has_passed_since_the_last_write(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "round-0001.partial.safetensors"
    under_way = UnderWay(path, {"round": "1"}, 30.0, clock)
    written: list[int] = []
    for step in range(1, 8):
        clock.now += 12.0
        under_way.offer(step, 0.0, lambda step=step: written.append(step) or tensors())  # type: ignore[misc]
    assert written == [3, 6]


@pytest.mark.parametrize(("every_s", "writes"), [(30.0, [3, 15]), (0.0, list(range(1, 21)))])
def test_a_write_that_takes_long_is_made_less_often_unless_each_step_was_asked_for(
    tmp_path: Path, every_s: float, writes: list[int]
) -> None:
    clock, written = Clock(), list[int]()
    under_way = UnderWay(tmp_path / "round-0001.partial.safetensors", {"round": "1"}, every_s, clock)

    def slow(step: int) -> Tensors:
        clock.now += 6.0
        written.append(step)
        return tensors()

    for step in range(1, 21):
        clock.now += 10.0
        under_way.offer(step, 0.0, lambda step=step: slow(step))  # type: ignore[misc]
    # step 3 is at 30 s, and steps follow in 10 s: the next write is 6 s / 0.05 = 120 s later
    assert written == writes


def test_seconds_before_an_interruption_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "round-0001.partial.safetensors"
    UnderWay(path, {"round": "1"}, 0.0).offer(5, 12.5, tensors)
    taken: list[Any] = []
    assert UnderWay(path, {"round": "1"}, 0.0).resume(taken.append) == (5, 12.5)
    assert same(taken[0], tensors())


def test_the_seconds_of_a_round_include_those_before_it_was_killed(
    site: Callable[..., ToySite],
    ask: Callable[..., TrainAsk],
    plan: RunPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Killed):
        site().answer(ask(plan), plan, kill_after=1)
    resume = UnderWay.resume
    monkeypatch.setattr(UnderWay, "resume", lambda self, load: (resume(self, load)[0], 1000.0))
    assert 1000.0 < site().answer(ask(plan), plan).metrics["seconds"] < 1100.0


def test_tensors_that_the_round_cannot_take_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "round-0001.partial.safetensors"
    UnderWay(path, {"round": "1"}, 0.0).offer(5, 12.5, tensors)

    def refuse(came: Any) -> None:
        raise ValueError("Expected another network.")

    with caplog.at_level(logging.WARNING, "client"):
        assert UnderWay(path, {"round": "1"}, 0.0).resume(refuse) == (0, 0.0)
    assert "Expected another network" in caplog.text and not path.exists()


def test_a_full_disk_costs_the_partial_round_and_not_the_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.training.site_state.save_weights", full)
    with caplog.at_level(logging.WARNING, "client"):
        UnderWay(tmp_path / "round-0001.partial.safetensors", {}, 0.0).offer(4, 1.0, tensors)
    assert "could not be written after step 4" in caplog.text and list(tmp_path.iterdir()) == []


def test_the_cohort_is_told_by_its_people_in_their_order(toy_scans: Any) -> None:
    one = toy_scans(["a", "b", "c", "d"])
    assert cohort_sha256(one) == cohort_sha256(toy_scans(["a", "b", "c", "d"]))
    others = [toy_scans(["a", "b", "d", "c"]), toy_scans(["a", "b", "c"]), toy_scans(["ab", "", "c", "d"])]
    held_out = toy_scans(["a", "b", "c", "d"])
    held_out.train = [0, 1, 2]
    assert cohort_sha256(one) not in {cohort_sha256(s) for s in (*others, held_out)}
