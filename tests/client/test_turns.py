"""Turns on a site's machine: nobody is overtaken, nobody waits for more than one answer of each other."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from client.turns import TURNS, turn
from client.watchdog import DeadlineMissed, watchdog

ROOT = Path(__file__).resolve().parents[2]
PLAN = """\
import contextlib, fcntl, sys, time, pathlib
from client.turns import turn
state, name, answers, kind = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

@contextlib.contextmanager
def plain_lock(state):
    with (state / "plain").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

(state / name).touch()
while len(list(state.glob("plan-*"))) < 3: time.sleep(.01)
for number in range(answers):
    asked = time.time()
    with (turn if kind == "turn" else plain_lock)(state):
        begins = time.time()
        time.sleep(.2)
        ended = time.time()
    print(name, asked, begins, ended, flush=True)
"""


@pytest.fixture(autouse=True)
def this_process_lives() -> Iterator[None]:
    """The watchdog's clock would end it, in time."""
    yield
    faulthandler.cancel_dump_traceback_later()


def three_plans(folder: Path, kind: str) -> list[tuple[float, float, float, str]]:
    """Six answers of each of three plans that ask at once: when each began, ended, was asked, and whose."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PLAN, str(folder), f"plan-{name}", "6", kind],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    told = [line.split() for program in programs for line in program.communicate()[0].splitlines()]
    answers = sorted((float(b), float(e), float(a), name) for name, a, b, e in told)
    assert len(answers) == 18
    assert all(begins >= ended for (_, ended, _, _), (begins, _, _, _) in pairwise(answers))  # one at a time
    return answers


def most_waited_for(answers: list[tuple[float, float, float, str]]) -> int:
    """The most answers of one other plan that began between a question and its own answer."""
    counts = [0]
    for begins, _, asked, name in answers:
        between = [other for b, _, _, other in answers if asked < b < begins]
        counts += [between.count(other) for other in set(between) - {name}]
    return max(counts)


def test_three_plans_wait_for_at_most_one_answer_of_each_other_and_with_a_plain_lock_for_more(
    tmp_path: Path,
) -> None:
    assert most_waited_for(three_plans(tmp_path, "turn")) == 1
    (tmp_path / "plain").mkdir()
    assert most_waited_for(three_plans(tmp_path / "plain", "plain")) > 1


def test_a_turn_of_a_process_that_was_killed_is_given_back(tmp_path: Path) -> None:
    holding = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, pathlib\nfrom client.turns import turn\n"
         "with turn(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(300)", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holding.stdout is not None and holding.stdout.readline() == "held\n"
    entered = threading.Event()

    def wait() -> None:
        with turn(tmp_path):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.5)
    os.kill(holding.pid, signal.SIGKILL)
    holding.communicate()
    assert entered.wait(10)
    waiting.join()
    assert [path.name for path in (tmp_path / TURNS).iterdir()] == ["lock"]


def test_who_waits_too_long_for_a_turn_is_late_and_leaves_the_queue(tmp_path: Path) -> None:
    left = threading.Event()

    def late() -> None:
        try:
            with turn(tmp_path):
                raise AssertionError
        except DeadlineMissed:
            left.set()

    with turn(tmp_path) as waited:
        assert waited < 1.0
        with pytest.raises(DeadlineMissed):
            watchdog(tmp_path / "log", 0.5, late)
        assert left.wait(10)
    began = time.monotonic()
    with turn(tmp_path):
        assert time.monotonic() - began < 1.0
