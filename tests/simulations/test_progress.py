"""What is seen while a simulation runs: never silent for more than five seconds, whatever is slow."""

import io
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.latents import encoding
from server import model
from server.config import compose_config
from simulations import observer, run
from simulations.hospitals import phantom
from simulations.progress import Live
from simulations.pulse import Pulse
from tests.small_simulation import small_simulation

SLOW_S = 30
MOST_SILENT_S = 5.0


class Clock:
    """A clock that goes only when it is told to; at each second the pulse looks, as its thread would."""

    def __init__(self) -> None:
        self.now = 0.0
        self.look: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.look()


class Noting(io.StringIO):
    """Lines, each with the time at which it was written."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.lines: list[tuple[float, str]] = []

    def write(self, text: str) -> int:
        self.lines += [(self.clock.now, line) for line in text.splitlines() if line.strip()]
        return len(text)

    def longest_silence(self) -> float:
        times = [0.0, *(at for at, _ in self.lines), self.clock.now]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


def piped(clock: Clock) -> tuple[Live, Noting]:
    screen = Noting(clock)
    live = Live(Console(file=screen, force_terminal=False, width=200), clock=clock)
    clock.look = live.pulse.look
    return live, screen


SLOW = (
    (phantom, "_keep_or_make", "making hospitals"),
    (encoding.Encoder, "write", "north: reading"),
    (model.MeduetModel, "after_survey", ""),
    (model.MeduetModel, "after_erasure", ""),
    (observer, "measure", "probing the models"),
    (observer, "check_alignment", "comparing style heads"),
    (observer, "draw_swaps", "drawing patients"),
    (run, "write_page", "drawing the page"),
)
"""Parts of a run, each made to take long, and what is said meanwhile."""


def test_a_run_in_which_everything_is_slow_is_never_silent_for_more_than_five_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock()
    live, screen = piped(clock)
    main = threading.get_ident()

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() == main:  # scans are made at once, and the clock is one
                clock.passes(SLOW_S)
            return function(*arguments, **named)

        return slowly

    for owner, name, _ in SLOW:
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    monkeypatch.setattr(run, "Live", lambda: live)
    monkeypatch.setattr(live, "on_step", slow(live.on_step))
    settings = [*small_simulation(rounds=1), f"folder={tmp_path}"]
    run.run(compose_config(settings))
    assert clock.now > 15 * SLOW_S
    assert screen.longest_silence() <= MOST_SILENT_S
    pulses = [line for _, line in screen.lines if line[0].isdigit()]
    for what in [*(what for _, _, what in SLOW), "north: steps", "rounds"]:
        assert any(what in line for line in pulses), what
    assert all("left" in line for line in pulses)


def test_without_its_pulse_the_same_run_would_be_silent(tmp_path: Path) -> None:
    clock = Clock()
    live, screen = piped(clock)
    clock.look = lambda: None
    with live.counting("something slow", 3):
        clock.passes(SLOW_S)
    assert screen.longest_silence() > MOST_SILENT_S


def test_the_time_left_follows_the_pace_and_the_longest_bar() -> None:
    clock = Clock()
    live, screen = piped(clock)
    with live.counting("probing the models", 4) as probed, live.reading("north") as read:
        clock.passes(6)
        assert screen.lines[-1][1].endswith("time left not known yet")
        probed(1, 4)
        read("encoding", 2, 3)
        clock.passes(4)  # 10 s for one of four; two of three since nobody knows
    assert "probing the models 1 of 4; north: encoding 2 of 3" in screen.lines[-1][1]
    assert screen.lines[-1][1].endswith("about 0:24 left")  # said at second 8, as the last line was at 4


def test_the_thread_speaks_while_the_main_one_is_busy() -> None:
    said = []
    with Pulse(lambda: said.append(time.monotonic()), pulse_s=0.02, look_s=0.005):
        time.sleep(0.3)
    assert len(said) > 3
    before = len(said)
    time.sleep(0.05)
    assert len(said) == before


def test_who_speaks_is_not_interrupted() -> None:
    clock = Clock()
    said: list[float] = []
    pulse = Pulse(lambda: said.append(clock.now), clock=clock)
    for _ in range(20):
        clock.now += 1
        pulse.look()
        if clock.now % 3 == 0:
            pulse.beat()
    assert said == []
