"""Submission: again after every failure that another try may mend, never twice at once, never for ever."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meduet_models.tokenizer.tokenizer import shipped_tokenizer
from server.checkpoints import Checkpoint, Checkpoints, OtherPlan
from server.deployment import submission
from server.deployment.control import ControlFailed, FlowerRun
from server.deployment.submission import ATTEMPTS, RunGivenUp, Submission
from server.run_folder import claim, held, write_metrics

Act = Callable[[int], str]


class Centre:
    """In place of SuperLink: `act(n)` is what the n-th submission does, and the status it then has."""

    def __init__(self, act: Act) -> None:
        self.act, self.statuses, self.stopped, self.down = act, dict[str, str](), list[str](), 0
        self.settings: dict[str, str] = {}
        self.consortium = Path("/srv/consortium")

    def runs(self) -> list[FlowerRun]:
        if self.down:
            self.down -= 1
            raise ControlFailed("Expected SuperLink to be up; it is not (yet).")
        return [FlowerRun(identity, status) for identity, status in self.statuses.items()]

    def start(self, app: Path, run_config: dict[str, str]) -> str:
        assert (app / "server" / "server_app.py").is_file() and app.name == "fedmeduet"
        self.settings = run_config
        identity = str(len(self.statuses) + 1)
        self.statuses[identity] = self.act(len(self.statuses) + 1)
        return identity

    def stop(self, run: str) -> None:
        self.stopped.append(run)
        self.statuses[run] = "finished:stopped"


@pytest.fixture
def seen_through(
    tmp_path: Path, tiny_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Centre], list[str]]:
    monkeypatch.setattr(submission, "PAUSE_S", 0.0)
    monkeypatch.setattr(submission, "_TICK_S", 0.01)
    (tmp_path / "plan.json").write_text(tiny_plan.to_json())

    def see(centre: Centre) -> list[str]:
        said: list[str] = []
        Submission(centre, tmp_path / "plan.json", tmp_path / "run", said.append).see_through()  # type: ignore[arg-type]
        return said

    return see


def complete(folder: Path, plan: Any) -> str:
    claim(folder, plan)
    write_metrics(folder, {"rounds": [], "final": {}})
    return "finished:completed"


def after_round(folder: Path, plan: Any, round_number: int) -> str:
    checkpoint = Checkpoint(plan_sha256=plan.sha256, round=round_number, shared={}, optimiser={}, bank={})
    Checkpoints(folder / "checkpoints", plan.sha256).save(checkpoint)
    return "finished:failed"


def test_a_run_that_fails_is_submitted_until_it_is_complete(
    tmp_path: Path, tiny_plan: Any, seen_through: Callable[[Centre], list[str]]
) -> None:
    folder = tmp_path / "run"
    centre = Centre(
        lambda n: complete(folder, tiny_plan) if n == 9 else after_round(folder, tiny_plan, (n + 1) // 2)
    )
    centre.down = 2
    said = seen_through(centre)  # eight failures, but never many without progress
    assert len(centre.statuses) == 9
    assert centre.settings == {
        "plan": str(tmp_path / "plan.json"),
        "folder": str(folder),
        "consortium": "/srv/consortium",  # whose key a node has
        "tokenizer": str(shipped_tokenizer(tiny_plan.network.latent_channels)),  # not in a bundle
    }
    assert said[0].startswith("Expected SuperLink to be up")
    assert said[-1].startswith("complete:")
    assert sum("submitted" in line for line in said) == 9
    assert seen_through(centre) == [said[-1]]  # given again, there is nothing to do


def test_failures_without_progress_are_given_up_with_the_last_reason(
    tmp_path: Path, seen_through: Callable[[Centre], list[str]]
) -> None:
    def fail(n: int) -> str:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "failed", "reason": "no sites."}))
        return "finished:failed"

    centre = Centre(fail)
    with pytest.raises(RunGivenUp, match=r"after no checkpoint without getting further. Last: no sites\."):
        seen_through(centre)
    assert len(centre.statuses) == ATTEMPTS


def test_what_would_end_in_the_same_way_again_is_not_tried_again(
    tmp_path: Path, seen_through: Callable[[Centre], list[str]]
) -> None:
    def refuse(n: int) -> str:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "refused", "reason": "too big."}))
        return "finished:failed"

    centre = Centre(refuse)
    with pytest.raises(RunGivenUp, match="cannot go on: too big"):
        seen_through(centre)
    assert len(centre.statuses) == 1


def test_an_operators_stop_holds_until_the_command_is_given_again(
    tmp_path: Path, tiny_plan: Any, seen_through: Callable[[Centre], list[str]]
) -> None:
    centre = Centre(lambda n: "finished:stopped" if n == 1 else complete(tmp_path / "run", tiny_plan))
    with pytest.raises(RunGivenUp, match="An operator stopped the run"):
        seen_through(centre)
    assert len(centre.statuses) == 1
    seen_through(centre)
    assert len(centre.statuses) == 2


def test_a_run_that_is_under_way_is_watched_and_not_submitted_twice(
    tmp_path: Path, tiny_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "PAUSE_S", 0.0)
    monkeypatch.setattr(submission, "_TICK_S", 0.01)
    (tmp_path / "plan.json").write_text(tiny_plan.to_json())
    folder = tmp_path / "run"
    ticks = 0

    def later() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 20:
            complete(folder, tiny_plan)

    centre = Centre(lambda n: "running")
    for _ in range(2):  # the second time as if the first had been interrupted
        Submission(centre, tmp_path / "plan.json", folder).see_through(later)  # type: ignore[arg-type]
        (folder / "metrics.json").unlink()
        ticks = 0
    assert list(centre.statuses) == ["1"]


def test_an_application_that_died_is_noticed_by_its_lock_and_replaced_at_once(
    tmp_path: Path, tiny_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "PAUSE_S", 3600.0)  # so that only the lock can tell
    monkeypatch.setattr(submission, "_TICK_S", 0.01)
    (tmp_path / "plan.json").write_text(tiny_plan.to_json())
    folder = tmp_path / "run"
    centre = Centre(lambda n: "running" if n == 1 else complete(folder, tiny_plan))
    application = held(folder)
    ticks = 0

    def live_then_die() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 2:
            application.__enter__()
        if ticks == 6:
            application.__exit__(None, None, None)

    Submission(centre, tmp_path / "plan.json", folder).see_through(live_then_die)  # type: ignore[arg-type]
    assert centre.stopped == ["1"]  # SuperLink thought it was running
    assert len(centre.statuses) == 2


def test_the_end_of_an_application_is_not_taken_for_that_of_the_next(
    tmp_path: Path, tiny_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "PAUSE_S", 0.0)
    monkeypatch.setattr(submission, "_TICK_S", 0.01)
    (tmp_path / "plan.json").write_text(tiny_plan.to_json())
    folder = tmp_path / "run"
    centre, ticks = Centre(lambda n: "running"), 0
    looks: list[bool] = []

    def later() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 2:  # it lost its SuperLink a minute ago, and gives up between two looks at its lock
            centre.statuses["1"] = "finished:failed"
            looks.extend([True, False, False])
        if ticks == 30:
            complete(folder, tiny_plan)

    monkeypatch.setattr(submission, "is_held", lambda folder: looks.pop(0) if looks else False)
    Submission(centre, tmp_path / "plan.json", folder).see_through(later)  # type: ignore[arg-type]
    assert centre.stopped == []
    assert list(centre.statuses) == ["1", "2"]


def test_a_folder_of_another_plan_is_refused_before_anything_is_submitted(
    tmp_path: Path, tiny_plan: Any, seen_through: Callable[[Centre], list[str]]
) -> None:
    import dataclasses

    claim(tmp_path / "run", dataclasses.replace(tiny_plan, seed=99))
    centre = Centre(lambda n: "running")
    with pytest.raises(OtherPlan, match="another folder"):
        seen_through(centre)
    assert centre.statuses == {}
