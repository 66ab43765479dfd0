"""The watchdog: what hangs is given up in time, and ends; what ends in time is left alone."""

import faulthandler
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client.books.answers import KeptAnswers
from client.declared import GateRefusal
from client.release import Gate
from client.watchdog import DeadlineMissed, unwatched, watchdog
from federation.journal import Journal
from federation.wire.wire import RefusalKind
from privacy.ledger import Ledger, Place
from privacy.promise import Promise
from tests.worlds import unanswered_places

ROOT = Path(__file__).resolve().parents[2]
PLAN = "9f3c" * 16


@pytest.fixture(autouse=True)
def this_process_lives() -> Iterator[None]:
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "site.log"


def end_of(program: str) -> subprocess.CompletedProcess[str]:
    """A process that runs `program`, to its end."""
    imports = "import ctypes, pathlib, sys, threading, time\nfrom client.watchdog import *\n"
    return subprocess.run(
        [sys.executable, "-c", imports + program],
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_ends_in_time_passes_and_what_it_raises_keeps_its_kind(log: Path) -> None:
    assert watchdog(log, 60.0, lambda: 7) == 7

    def fail() -> None:
        raise GateRefusal("no", RefusalKind.NON_FINITE)

    with pytest.raises(GateRefusal) as refusal:
        watchdog(log, 60.0, fail)
    assert refusal.value.kind is RefusalKind.NON_FINITE
    assert "in fail" in "".join(str(entry) for entry in refusal.traceback)  # where it was raised
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt):
            watchdog(log, 60.0, lambda interrupt=interrupt: (_ for _ in ()).throw(interrupt))  # type: ignore[misc]
    with pytest.raises(TimeoutError, match="the disk"):  # its own, not the watchdog's

        def slow_disk() -> None:
            raise TimeoutError("the disk")

        watchdog(log, 60.0, slow_disk)
    assert log.read_text() == ""


def test_the_clock_stops_with_the_answer(log: Path) -> None:
    watchdog(log, 0.1, lambda: None, grace_s=0.1)
    time.sleep(0.5)  # this process lives
    assert log.read_text() == ""


def test_a_hang_is_given_up_before_the_deadline_and_its_stack_is_in_the_log(log: Path) -> None:
    log.write_text("before\n")
    never = threading.Event()

    def stuck_in_the_scanner() -> None:
        never.wait(60)

    began = time.monotonic()
    text = r"within 0\.9 of what was left of aggregation\.deadline_s \(1\.0 s\)"
    with pytest.raises(DeadlineMissed, match=text):
        watchdog(log, 1.0, stuck_in_the_scanner)
    assert 0.9 <= time.monotonic() - began < 30.0
    never.set()
    text = log.read_text()
    assert text.startswith("before\n") and "stuck_in_the_scanner" in text
    assert "most recent call first" in text


def test_the_work_has_the_callers_threads_gradients_and_context(log: Path) -> None:
    number = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = watchdog(log, 60.0, lambda: (torch.get_num_threads(), torch.is_grad_enabled()))
    finally:
        torch.set_num_threads(number)
    assert found == (3, True)
    assert watchdog(log, 60.0, threading.current_thread) is not threading.current_thread()
    assert unwatched(log, 60.0, threading.current_thread) is threading.current_thread()


def gate_of(folder: Path) -> tuple[Ledger, Journal, Callable[[], Any]]:
    ledger, journal = Ledger(folder / "ledger.jsonl"), Journal(folder / "journal.jsonl")
    promise = Promise(kind="round", bound=10.0, unit="site update", enforcement="clip")
    place = Place(plan_sha256=PLAN, kind="round", round=1)
    gate = Gate(ledger.reserve(place, "a5" * 32, promise), ledger, journal, KeptAnswers(folder / "answers"))
    tensors = {"w": torch.ones(2)}
    return ledger, journal, lambda: gate.release(tensors, {"w": (2,)})


def test_an_answer_that_was_given_up_does_not_pass_the_gate_later(log: Path, tmp_path: Path) -> None:
    _, journal, release = gate_of(tmp_path)
    go, ended, came = threading.Event(), threading.Event(), list[Any]()

    def late() -> None:
        go.wait(60)
        try:
            came.append(release())
        except GateRefusal as error:
            came.append(error.kind)
        finally:
            ended.set()

    with pytest.raises(DeadlineMissed):
        watchdog(log, 0.3, late)
    go.set()
    assert ended.wait(60)
    assert came == [RefusalKind.DEADLINE]
    assert journal.verify() == 0 and unanswered_places(tmp_path / "ledger.jsonl") == [("round", 1)]
    assert release().record["kind"] == "round"  # asked again, in another thread's turn, it may


def test_an_answer_that_passed_the_gate_is_waited_for(log: Path, tmp_path: Path) -> None:
    _, journal, release = gate_of(tmp_path)

    def slow_to_keep_its_state() -> Any:
        released = release()
        time.sleep(1.0)
        return released

    began = time.monotonic()
    assert watchdog(log, 0.5, slow_to_keep_its_state).record["kind"] == "round"
    assert time.monotonic() - began >= 1.0
    assert journal.verify() == 1 and log.read_text() == ""


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_answer_that_was_interrupted_does_not_pass_the_gate_later(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    _, journal, release = gate_of(tmp_path)
    go, ended = threading.Event(), threading.Event()

    def late() -> None:
        go.wait(60)
        try:
            release()
        finally:
            ended.set()

    def interrupted(*given: Any) -> None:
        raise interrupt

    monkeypatch.setattr("client.watchdog.wait", interrupted)
    with pytest.raises(interrupt):
        watchdog(log, 60.0, late)
    go.set()
    assert ended.wait(60)
    assert journal.verify() == 0


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(300)",
        "exec('while True: pass')",
        "[__import__('torch').ones(400, 400) @ __import__('torch').ones(400, 400) for _ in iter(int, 1)]",
    ],
)
def test_a_process_that_gave_up_a_hanging_answer_still_speaks_and_ends_by_itself(
    log: Path, hang: str
) -> None:
    done = end_of(
        f"try: watchdog(pathlib.Path({str(log)!r}), 0.5, lambda: {hang}, grace_s=100.0)\n"
        "except DeadlineMissed: print('deadline', flush=True)\nsys.exit(0)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "deadline\n", "")
    assert "most recent call first" in log.read_text()


# the first holds Python's global lock: no thread of Python's could end it; the second waits in a thread that
# the interpreter waits for
HANGS = [
    "lambda: ctypes.PyDLL(None).sleep(300)",
    "lambda: __import__('concurrent.futures').futures.ThreadPoolExecutor(1).submit(time.sleep, 300).result()",
]


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_cannot_end_by_itself_is_ended(log: Path, hang: str) -> None:
    done = end_of(
        f"try: watchdog(pathlib.Path({str(log)!r}), 0.5, {hang}, grace_s=1.5)\n"
        "except DeadlineMissed: pass\nsys.exit(0)\n"
    )
    assert done.returncode == 1
    assert done.stdout + done.stderr == ""  # Flower would carry it away
    assert "Timeout (0:00:02" in log.read_text()


def test_without_a_watchdog_nothing_is_written(log: Path) -> None:
    assert unwatched(log, 0.0, lambda: time.sleep(0.05) or 7) == 7
    assert not log.exists()


def test_what_the_work_logs_is_of_its_context(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "client"):
        watchdog(log, 60.0, lambda: logging.getLogger("scans.scans").warning("from the inside"))
    assert caplog.records[0].threadName == "answer"
