"""A day on which all that can die at the centre does, and then everything everywhere: no completed round is
lost, and the final weights are those of a day on which nothing happened.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.consortium import RUN, kill
from tests.faults.day import Day
from tests.faults.day import day as one_day
from tests.faults.page import Book
from tests.local_account import family

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    with one_day(tmp_path_factory.mktemp("centre"), rounds=8) as one:
        yield one


def test_nothing_happens(day: Day, book: Book) -> None:
    day.nothing_happens(book)


def test_the_server_application_is_killed(day: Day, book: Book) -> None:
    kill(day.run.status()["pid"])
    seconds = day.next_round()
    assert day.run.status()["resumed"] == 1
    assert [line["round"] for line in day.run.journal("resume")] == [1]
    book.note(
        "server application, `kill -9`",
        "its lock on the run's folder goes with it; the run is submitted again and goes on after the last "
        "checkpoint; a site that was at work finishes first",
        "the work of the round under way; same bits",
        seconds - day.round_s,
    )


def test_superlink_is_away_for_8_seconds(day: Day, book: Book) -> None:
    seconds = superlink_away(day, 8.0)
    book.note(
        "SuperLink, `kill -9`, away for 8 s",
        "sites and run go on",
        "nothing; same bits",
        seconds - day.round_s,
    )


def test_superlink_is_away_for_75_seconds(day: Day, book: Book) -> None:
    seconds = superlink_away(day, 75.0)
    book.note(
        "SuperLink, `kill -9`, away for 75 s",
        "Flower gives the run up; it is submitted again when SuperLink is back, and goes on after the last "
        "checkpoint",
        "the work of the round under way; same bits",
        seconds - day.round_s,
    )


def superlink_away(day: Day, away_s: float) -> float:
    """Kill SuperLink and keep it from coming back for so long; seconds until the round was on disk."""
    centre = day.run.supervisor.pid("centre")
    assert centre is not None
    begun = time.monotonic()
    os.kill(centre, signal.SIGSTOP)  # or it would be there again after a second
    try:
        kill(day.run.centre_child("superlink"))
        day.run.let_go(day.site)
        day.run.until(lambda: time.monotonic() - begun >= away_s, "the outage", away_s + 60)
    finally:
        os.kill(centre, signal.SIGCONT)
    waited = time.monotonic() - begun
    return waited + day.next_round()


def test_a_checkpoint_is_damaged_while_the_application_is_down(day: Day, book: Book) -> None:
    path = day.run.poc.run_folder / "checkpoints" / f"round-{day.round - 1:04d}.safetensors"
    kill(day.run.status()["pid"])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # one bit
    path.write_bytes(content)
    begun = time.monotonic()
    day.run.let_go(day.site)
    lost = day.round - 1
    done = [*range(1, lost + 1), lost]  # that round again, from the checkpoint before
    day.run.until(lambda: day.run.rounds_done() == done, "the round that was lost")
    day.run.until(lambda: day.run.rounds_done() == [*done, lost + 1], "the round after it")
    seconds = time.monotonic() - begun
    assert day.run.journal("resume")[-1]["damaged_checkpoints"] == [lost]
    day.run.until(lambda: day.run.held(day.site) is not None, f"round {day.round + 1}")
    day.redone.append(lost)
    day.round += 1
    book.note(
        "a bit of the last checkpoint flips while the server application is down",
        "its hash finds it, the journal says so; the one before it is taken and the round is done again",
        "one round's work; same bits",
        seconds - 2 * day.round_s,
    )


def test_the_disk_is_full_when_a_checkpoint_is_written(day: Day, book: Book) -> None:
    if not os.path.ismount(day.run.poc.run_folder):
        pytest.skip("needs the right to mount a small file system: run as root")
    ballast = day.run.poc.run_folder / "ballast"
    begun = time.monotonic()
    fill(ballast)
    day.run.let_go(day.site)
    day.run.until(lambda: "No space left" in day.run.log(RUN), "a run that ended for want of space")
    assert day.run.rounds_done()[-1] == day.round - 1
    ballast.unlink()  # somebody makes room
    waited = time.monotonic() - begun
    waited += day.next_round()
    book.note(
        "disk full at the centre when a checkpoint is written",
        "the run ends and says why; nothing half-written is kept; it goes on when there is room",
        "the work of the round under way; same bits",
        waited - day.round_s,
    )


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def test_both_sides_are_killed(day: Day, book: Book) -> None:
    begun = time.monotonic()
    names = ("centre", *day.run.poc.site_yamls, RUN)
    pids = [pid for name in names if (pid := day.run.supervisor.pid(name)) is not None]
    assert len(pids) == len(names)
    kill(*(one for pid in pids for one in family(pid)))
    day.run.let_go(day.site)
    waited = time.monotonic() - begun
    waited += day.next_round()
    book.note(
        "every process at the centre and at the sites, `kill -9` (power cut)",
        "all start again; the run goes on after the last checkpoint, sites after their last step",
        "at most the work of the round under way; same bits",
        waited - day.round_s,
    )


def test_the_day_ends_in_the_bits_of_a_day_on_which_nothing_happened(day: Day) -> None:
    day.ends_as_if_nothing_had_happened()
