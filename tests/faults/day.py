"""A day: one run, which a test takes where the last one left it, held in the middle of a round.

A test spoils something, lets the round go on, and waits until the run is held in the middle of the next one.
At the end the weights must be those of a day on which nothing happened.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.consortium import (
    Consortium,
    Weights,
    command,
    consortium,
    same_bits,
    site_command,
    undisturbed,
)
from tests.faults.page import Book

_CLONE_NEWNS = 0x00020000


@dataclass
class Day:
    """The run, and the hospital in which it is held in each round."""

    run: Consortium
    expected: Weights
    site: str
    other: str
    rounds: int
    round: int = 1
    """The round in which it is held."""
    round_s: float = float("nan")
    """What is left of a round from there, when nothing happens."""
    redone: list[int] = field(default_factory=list)
    """Rounds that had to be done twice."""

    @property
    def done(self) -> list[int]:
        """The rounds that the journal should hold when the one that is held is over."""
        return [
            one
            for round_number in range(1, self.round + 1)
            for one in [round_number] * (1 + (round_number in self.redone))
        ]

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
        assert self.run.held(self.site)[0] == str(self.round)  # type: ignore[index]
        return seconds

    def nothing_happens(self, book: Book) -> None:
        """A round against which the others are timed."""
        self.round_s = self.next_round()
        book.rounds_s.append(self.round_s)
        assert self.run.status()["resumed"] == 0

    def ends_as_if_nothing_had_happened(self) -> None:
        """The last round goes on; no round is missing, the weights are the same, and so are all journals."""
        self.run.script(self.site, {})
        self.run.let_go(self.site)
        self.run.until(lambda: self.run.status().get("state") == "complete", "the end")
        expected = sorted([*range(1, self.rounds + 1), *self.redone])
        assert sorted(self.run.rounds_done()) == expected
        assert same_bits(self.run.weights(), self.expected)
        at_the_centre = command("server.cli", "journal", "verify", str(self.run.poc.run_folder))
        assert at_the_centre.returncode == 0, at_the_centre.stdout
        for config in self.run.poc.site_yamls.values():
            verified = site_command("journal", "verify", config=config)
            assert verified.returncode == 0, verified.stdout


@contextmanager
def day(folder: Path, rounds: int) -> Iterator[Day]:
    """Two hospitals, and so many rounds; held in the first. The run's folder is a small disk."""
    plan = ("hospitals.num_hospitals=2", f"training.rounds={rounds}", "aggregation.deadline_s=600")
    made, expected = undisturbed(folder / "undisturbed", plan)
    site, other = [hospital.name for hospital in made.hospitals][:2]
    holds = {str(round_number): {"do": "hold", "at_step": 1} for round_number in range(1, rounds + 1)}
    run = consortium(folder, plan, made, {site: holds})
    with small_disk(run.poc.run_folder), run.supervisor:
        run.until(lambda: run.held(site) is not None, "the first round")
        yield Day(run, expected, site, other, rounds)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for a folder, which can be filled; an ordinary folder without the right to
    mount. Only this process and its children see it; it goes with the last of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS) != 0:
        yield
        return
    _try("mount", "--make-rprivate", "/")
    _try("mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", str(folder))
    try:
        yield
    finally:
        _try("umount", "-l", str(folder))


def _try(*words: str) -> None:
    subprocess.run(words, check=False, capture_output=True)
