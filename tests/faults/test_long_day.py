"""One run, and everything that can die while it is under way: no completed round is lost, and the final
weights are those of a day on which nothing happened.

Each test takes the run where the last one left it: held in the middle of a round. It spoils something, lets
the round go on, and waits until the run is held in the middle of the next one.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.faults.consortium import (
    RUN,
    Consortium,
    Weights,
    beside,
    command,
    consortium,
    family,
    free_port,
    kill,
    same_bits,
    site_command,
    undisturbed,
)
from tests.faults.page import Book

pytestmark = pytest.mark.faults

ROUNDS = 13
PLAN = ("hospitals.num_hospitals=2", f"training.rounds={ROUNDS}", "aggregation.deadline_s=600")


@dataclass
class Day:
    """The run, and the hospital in which it is held in each round."""

    run: Consortium
    expected: Weights
    site: str
    other: str
    round: int = 1
    """The round in which it is held."""
    redone: list[int] = field(default_factory=list)
    """Rounds that had to be done twice."""

    @property
    def done(self) -> list[int]:
        """The rounds that the journal should hold when the one that is held is over."""
        return [one for round in range(1, self.round + 1) for one in [round] * (1 + (round in self.redone))]

    def next_round(self) -> float:
        """Let the round go on until the next one is under way; seconds until it was on disk.

        Fails if a round is done twice, out of order, or not at all.
        """
        self.run.let_go(self.site)
        seconds = self.run.until(
            lambda: self.run.rounds_done() == self.done, f"the end of round {self.round}"
        )
        self.run.until(lambda: self.run.held(self.site) is not None, f"round {self.round + 1}")
        self.round += 1
        assert self.run.held(self.site)[0] == self.round  # type: ignore[index]
        return seconds


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    folder = tmp_path_factory.mktemp("day")
    made, expected = undisturbed(folder / "undisturbed", PLAN)
    site, other = [hospital.name for hospital in made.hospitals][:2]
    holds = {round: {"do": "hold", "at_step": 1} for round in range(1, ROUNDS + 1)}
    run = consortium(folder, PLAN, made, {site: holds})
    with small_disk(run.poc.run_folder), run.supervisor:
        run.until(lambda: run.held(site) is not None, "the first round")
        yield Day(run, expected, site, other)


class small_disk:
    """A file system of its own for a folder, which can be filled; an ordinary folder without the right to
    mount."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(self._folder)],
            check=False,
            capture_output=True,
        )

    def __exit__(self, *raised: object) -> None:
        subprocess.run(["umount", "-l", str(self._folder)], check=False, capture_output=True)


def test_nothing_happens(day: Day, book: Book) -> None:
    book.round_s = day.next_round()
    assert day.run.status()["resumed"] == 0


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
        seconds - book.round_s,
    )


def test_superlink_is_away_for_8_seconds(day: Day, book: Book) -> None:
    seconds = superlink_away(day, 8.0)
    book.note(
        "SuperLink, `kill -9`, away for 8 s",
        "sites and run go on",
        "nothing; same bits",
        seconds - book.round_s,
    )


def test_superlink_is_away_for_75_seconds(day: Day, book: Book) -> None:
    seconds = superlink_away(day, 75.0)
    book.note(
        "SuperLink, `kill -9`, away for 75 s",
        "Flower gives the run up; it is submitted again when SuperLink is back, and goes on after the last "
        "checkpoint",
        "the work of the round under way; same bits",
        seconds - book.round_s,
    )


def superlink_away(day: Day, away_s: float) -> float:
    """Kill SuperLink and keep it from coming back for so long; seconds until the round was on disk."""
    centre = day.run.supervisor.pid("centre")
    assert centre is not None
    begun = time.monotonic()
    os.kill(centre, signal.SIGSTOP)  # or it would be there again after a second
    kill(day.run.centre_child("superlink"))
    day.run.let_go(day.site)
    day.run.until(lambda: time.monotonic() - begun >= away_s, "the outage", away_s + 60)
    os.kill(centre, signal.SIGCONT)
    waited = time.monotonic() - begun
    return waited + day.next_round()


def test_the_process_that_answers_for_a_site_is_killed(day: Day, book: Book) -> None:
    held = day.run.held(day.site)
    assert held is not None
    resumed = day.run.status()["resumed"]
    kill(held[1])  # as the kernel does when memory is short
    seconds = day.next_round()
    assert day.run.status()["resumed"] == resumed  # within the round
    book.note(
        "the process at work for a site, `kill -9` (or the kernel's, out of memory)",
        "Flower notices after up to 60 s; the site is asked again in the same round and continues after its "
        "last step",
        "nothing; same bits",
        seconds - book.round_s,
    )


def test_a_site_is_killed_in_the_middle_of_its_round(day: Day, book: Book) -> None:
    pid = day.run.supervisor.pid(day.site)
    assert pid is not None
    resumed = day.run.status()["resumed"]
    kill(*family(pid))
    seconds = day.next_round()
    assert day.run.status()["resumed"] == resumed
    assert "goes on from there" in day.run.site_log(day.site)
    book.note(
        "all of a site, `kill -9` in the middle of its round",
        "its supervisor starts again; the centre lets it in when Flower's heartbeat has run out; it is "
        "asked again in the same round and continues after its last step",
        "nothing; same bits",
        seconds - book.round_s,
    )


def test_the_network_of_a_site_is_cut_for_30_seconds(day: Day, book: Book) -> None:
    seconds = network_cut(day, 30.0)
    book.note(
        "network of a site cut for 30 s (packets dropped)",
        "the site tries on and hands in its answer",
        "nothing; same bits",
        seconds - book.round_s,
    )


def test_the_network_of_a_site_is_cut_for_120_seconds(day: Day, book: Book) -> None:
    seconds = network_cut(day, 120.0)
    book.note(
        "network of a site cut for 120 s",
        "Flower takes the site for lost; it is asked again in the same round when it is back",
        "nothing; same bits",
        seconds - book.round_s,
    )


def network_cut(day: Day, seconds: float) -> float:
    """Cut the wire of the held hospital, which works on; seconds until the round was on disk."""
    resumed = day.run.status()["resumed"]
    begun = time.monotonic()
    day.run.wires[day.site].cut()
    day.run.let_go(day.site)
    day.run.until(lambda: time.monotonic() - begun >= seconds, "the cut", seconds + 60)
    assert len(day.run.rounds_done()) == day.round - 1
    day.run.wires[day.site].mend()
    waited = time.monotonic() - begun
    waited += day.next_round()
    assert day.run.status()["resumed"] == resumed
    return waited


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
        seconds - 2 * book.round_s,
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
        waited - book.round_s,
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
        waited - book.round_s,
    )


def test_a_second_process_with_a_sites_key_is_refused(day: Day, book: Book) -> None:
    config = day.run.poc.site_yamls[day.other]
    twin = config.parent / "twin"
    twin.mkdir()
    settings = yaml.safe_load(config.read_text()) | {"state_dir": str(twin / "state"), "port": free_port()}
    (twin / "site.yaml").write_text(yaml.safe_dump(settings))
    with beside(twin / "site.yaml") as said:
        day.run.until(lambda: "Exit Code: 305" in said(), "a refusal of the twin")
    resumed = day.run.status()["resumed"]
    day.next_round()
    assert day.run.status()["resumed"] == resumed
    book.note(
        "a second process with a site's key", "refused (305), tried on; the first is not disturbed", "nothing"
    )


def test_the_day_ends_in_the_bits_of_a_day_on_which_nothing_happened(day: Day) -> None:
    day.run.script(day.site, {})
    day.run.let_go(day.site)
    day.run.until(lambda: day.run.status().get("state") == "complete", "the end")
    expected = sorted([*range(1, ROUNDS + 1), *day.redone])
    assert sorted(day.run.rounds_done()) == expected
    assert same_bits(day.run.weights(), day.expected)
    at_the_centre = command("server.cli", "journal", "verify", str(day.run.poc.run_folder))
    assert at_the_centre.returncode == 0, at_the_centre.stdout
    for config in day.run.poc.site_yamls.values():
        verified = site_command("journal", "verify", config=config)
        assert verified.returncode == 0, verified.stdout
