"""The status of a run is what happened: who answered, what crossed, who was put aside, how it ended."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from federation.wire.messages import Refusal
from federation.wire.wire import RefusalKind
from server.app import run
from server.checkpoints import OtherPlan
from server.deployment.status import StatusFile, read_status
from server.deployment.status_screen import as_json, gather, picture, show
from server.run_folder import FolderBusy, held, is_complete, is_held
from server.server_app import run_in_folder
from simulations.engines.in_process import InProcessGrid


def run_with_status(miniature: Any, folder: Path, plan: Any, tamper: Any = None) -> None:
    grid = InProcessGrid(miniature.client(folder / "sites", tamper=tamper), len(plan.sites))
    run(grid, plan, folder, model=miniature.model(plan), observer=StatusFile(plan, folder))


def text(folder: Path) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(picture(gather(folder)))
    return console.export_text()


def test_a_complete_run_says_what_every_site_did_and_what_crossed(miniature: Any, tmp_path: Path) -> None:
    run_with_status(miniature, tmp_path, miniature.plan())
    status = read_status(tmp_path)
    assert status is not None
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (status["state"], status["round"], status["resumed"]) == ("complete", 3, 0)
    assert status["loss"] == metrics["rounds"][-1]["loss"]
    for name, site in status["sites"].items():
        assert (site["state"], site["round"]) == ("answered", 3)
        replies = [entry["sites"][name] for entry in metrics["rounds"]]
        assert site["bytes_up"] == sum(report["bytes_up"] for report in replies) > 0
        assert site["bytes_down"] == sum(report["bytes_down"] for report in replies) > 0
        assert site["examples"] == replies[-1]["examples"]
    assert is_complete(tmp_path, miniature.plan().sha256)
    assert all(name in text(tmp_path) for name in status["sites"])
    assert json.loads(as_json(tmp_path))["run"] == {**status, "running": False}


def test_a_reply_that_does_not_count_is_on_show_with_its_reason(miniature: Any, tmp_path: Path) -> None:
    def refuse(site: str, kind: str, reply: Any) -> Any:
        if (site, kind) == ("lyon", "train") and reply.round == 2:
            return Refusal(kind=RefusalKind.BUDGET, site=site)
        return reply

    run_with_status(miniature, tmp_path, miniature.plan(quorum=0.6), refuse)
    status = read_status(tmp_path)
    assert status is not None
    (aside,) = status["quarantined"]
    assert (aside["round"], aside["site"], aside["why"]) == (2, "lyon", "refused: budget")
    assert status["sites"]["lyon"]["state"] == "answered"  # asked again in round 3
    assert "refused: budget" in text(tmp_path)


def test_a_run_that_is_stopped_and_started_again_counts_on(miniature: Any, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(site: str, kind: str, reply: Any) -> Any:
        if (site, kind) == ("lyon", "train") and reply.round == 3:
            raise Killed
        return reply

    plan = miniature.plan()
    with pytest.raises(Killed):
        run_with_status(miniature, tmp_path, plan, die)
    assert gather(tmp_path)["run"]["state"] == "interrupted"
    before = read_status(tmp_path)
    assert before is not None and before["state"] == "round"  # it could not say so itself
    run_with_status(miniature, tmp_path, plan)
    after = read_status(tmp_path)
    assert after is not None
    assert (after["resumed"], after["started"], after["state"]) == (1, before["started"], "complete")
    assert after["sites"]["oslo"]["bytes_up"] > before["sites"]["oslo"]["bytes_up"]


def test_how_a_run_failed_is_on_record_and_whether_again_would_help(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan(deadline_s=0.2)
    with pytest.raises(RuntimeError, match="connected sites"):
        run_in_folder(InProcessGrid(miniature.client(tmp_path / "sites"), 0), plan, tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "failed" and "Start the sites" in status["reason"]
    with pytest.raises(OtherPlan):
        other = miniature.plan(seed=2)
        run_in_folder(InProcessGrid(miniature.client(tmp_path / "sites"), 0), other, tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "refused" and "Expected" in text(tmp_path / "run")


def test_two_applications_never_write_one_run(miniature: Any, tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(FolderBusy, match="another process does"):
            run_in_folder(InProcessGrid(miniature.client(tmp_path), 0), miniature.plan(), tmp_path)
    assert not is_held(tmp_path)
    assert read_status(tmp_path) is None


def test_in_the_middle_of_a_round_the_screen_says_who_is_awaited_what_crossed_and_what_the_rounds_cost(
    miniature: Any, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    seen: list[str] = []

    def look(site: str, kind: str, reply: Any) -> Any:
        if (site, kind) == ("lyon", "train") and reply.round == 2:
            return Refusal(kind=RefusalKind.BUDGET, site=site)
        if (site, kind) == ("lyon", "train") and reply.round == 3:
            with held(tmp_path):
                seen.append(text(tmp_path))
            raise Killed
        return reply

    with pytest.raises(Killed):
        run_with_status(miniature, tmp_path, miniature.plan(quorum=0.6), look)
    (shown,) = seen
    assert "round 3 of 3" in shown and "round for" in shown
    others = [line for line in shown.splitlines() if "asked" in line or "answered" in line]
    assert any("lyon" in line and "asked" in line for line in others)
    rounds = gather(tmp_path)["rounds"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())["rounds"]
    assert [one["round"] for one in rounds] == [1, 2]
    assert rounds[1]["refused"] == {"lyon": "refused: budget"} and "lyon" not in rounds[1]["answered"]
    assert [one["loss"] for one in rounds] == [one["loss"] for one in metrics]
    assert f"{metrics[1]['loss']['total']:.3f}" in shown
    assert f"{len(rounds[1]['answered'])} of {len(rounds[0]['answered'])}" in shown


def test_a_site_that_did_not_answer_the_survey_was_not_seen(miniature: Any, tmp_path: Path) -> None:
    status = StatusFile(miniature.plan(), tmp_path)
    status.on_survey({"refused": {"lyon": "no reply before the deadline"}}, {})
    read = read_status(tmp_path)
    assert read is not None
    assert (read["sites"]["lyon"]["state"], read["sites"]["lyon"]["last_seen"]) == ("put aside", None)
    assert read["sites"]["oslo"]["state"] == "surveyed" and read["sites"]["oslo"]["last_seen"]
    assert "never" in text(tmp_path) and "no reply before the deadline" in text(tmp_path)


def test_the_live_screen_stays_until_the_run_is_over_and_ctrl_c_ends_only_the_looking(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = StatusFile(miniature.plan(), tmp_path)
    looks: list[float] = []

    def next_look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            status.failed("the disk is full", final=True)

    monkeypatch.setattr("server.deployment.status_screen.time.sleep", next_look)
    terminal = Console(width=120, file=io.StringIO(), force_terminal=True, record=True)
    show(terminal, tmp_path)
    assert len(looks) == 2 and "the disk is full" in terminal.export_text()
    status.on_round_start(1, 3)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.deployment.status_screen.time.sleep", interrupt)
    show(terminal, tmp_path)  # returns


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Was it submitted yet"):
        gather(tmp_path)
