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
import sys, time, pathlib
from client.turns import turn
state, name, answers = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(state / name).touch()
while len(list(state.glob("plan-*"))) < 3: time.sleep(.01)
for number in range(answers):
    asked = time.time()
    with turn(state) as waited:
        begins = time.time()
        time.sleep(.2)
        print(name, asked, begins, time.time(), flush=True)
"""


@pytest.fixture(autouse=True)
def this_process_lives() -> Iterator[None]:
    """The watchdog's clock would end it, in time."""
    yield
    faulthandler.cancel_dump_traceback_later()


def test_three_plans_take_turns_in_the_order_of_their_questions_and_wait_one_answer_of_each_other(
    tmp_path: Path,
) -> None:
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PLAN, str(tmp_path), f"plan-{name}", "6"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    told = [line.split() for program in programs for line in program.communicate()[0].splitlines()]
    answers = sorted((float(b), float(e), float(a), name) for name, a, b, e in told)
    assert len(answers) == 18
    for (_, ended, _, _), (begins, _, _, _) in pairwise(answers):
        assert begins >= ended  # one at a time
    for begins, _, asked, name in answers:
        between = [other for b, _, _, other in answers if asked < b < begins]
        assert len(between) == len(set(between) - {name})  # at most one of each other plan, none of its own
    asked_in_order = [asked for _, _, asked, _ in answers]
    inversions = sum(a > b + 0.1 for a, b in pairwise(asked_in_order))
    assert inversions == 0


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
