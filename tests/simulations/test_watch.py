"""A simulation shows itself while it runs, from its first line on; what has ended says so at once."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from federation.watching import Section, Watched, page
from server.app import RunObserver
from server.deployment.watch import watched
from simulations.progress import Live
from simulations.together import Together
from simulations.watch import SimulationPage
from tests.scraping import read
from tests.small_simulation import small_simulation

ROOT = Path(__file__).resolve().parents[2]
HEART_S = 30.0


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A simulation of many rounds, and the address that it printed first."""
    small = small_simulation(rounds=500)
    command = [sys.executable, "-m", "simulations.cli", *small, f"folder={tmp_path / 'run'}"]
    with (tmp_path / "out").open("w") as out:
        started = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, text=True, env={**os.environ})
    first = ""
    while not first.endswith("\n"):
        assert started.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.05)
        first = (tmp_path / "out").read_text().partition("\n")[0]
        first += "\n" if first else ""
    yield started, first.split()[0]
    started.kill()
    started.wait()


def test_the_first_line_is_the_address_of_a_page_that_follows_the_run_to_its_end(
    running: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    started, address = running
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", address)
    assert "Under way" in read(address)  # before there is a run
    deadline = time.monotonic() + 240
    while "rounds" not in (text := read(address)) or "answered" not in text:
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    assert "of 500" in text and "bounded, not differentially private" in text
    assert 'class="bad"' not in text and "<script" not in text
    numbers = read(f"{address}metrics")
    assert len(set(re.findall(r"^# TYPE (\S+)", numbers, re.MULTILINE))) >= 20
    assert "meduet_run_alive 1.0" in numbers
    started.send_signal(signal.SIGKILL)
    ended = time.monotonic()
    started.wait()
    while "interrupted" not in page(watched(tmp_path / "run")):
        assert time.monotonic() - ended < HEART_S
    with pytest.raises(urllib.error.URLError):
        read(address)


def test_the_page_shows_work_before_there_is_a_run_and_both_after() -> None:
    shown = SimulationPage("demo")
    assert shown.look().state == "loading libraries"
    live = Live()
    shown.show_work(live)
    with live.counting("making hospitals", 24) as progress:
        progress(7, 24)
        assert list(shown.look().sections[0].rows) == [("making hospitals", "7", "24", "0:00")]
        shown.show_run(lambda: Watched("demo", "round 1 of 2", [Section("Sites", ("site",), [])], []))
        seen = shown.look()
    assert seen.state == "round 1 of 2" and [one.title for one in seen.sections] == ["Under way", "Sites"]


def test_observers_together_are_all_told_and_their_probes_are_put_together() -> None:
    class Probing(RunObserver):
        def __init__(self, name: str) -> None:
            self.name, self.rounds = name, list[int]()

        def on_round_end(self, round_number: int, shared: object, metrics: object) -> dict[str, float]:
            self.rounds.append(round_number)
            return {self.name: 1.0}

    first, second = Probing("a"), Probing("b")
    together = Together(first, second)
    assert together.on_round_end(1, {}, {}) == {"a": 1.0, "b": 1.0}
    assert first.rounds == second.rounds == [1]
    assert together.on_end(None) == {}  # type: ignore[arg-type]
