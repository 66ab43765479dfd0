"""A consortium of real processes on loopback, and something that goes wrong in the middle of its run.

Not collected unless asked for (`pytest -m faults`): minutes, gigabytes, and ports. Each run ends in the bits
of the same plan run in this process by the process engine, whose sites are the same, or something was lost.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation.journal import Journal
from federation.processes import Supervisor
from meduet_models.weights import load_weights
from server.app import RunObserver
from server.config import compose_config, plain
from server.control import Control
from server.status import read_status
from server.submission import Submission
from simulations.in_process import fixed_threads
from simulations.poc import SMALL, Poc, provision
from simulations.progress import Live
from simulations.run import Made, prepare, simulate

TINY = (
    "hospitals.num_hospitals=2",
    "hospitals.patients=9",
    "volumes.spacing_mm=[6,8,8]",
    "volumes.shape=[32,24,24]",
    "style.minimum_cohort=2",
    "network.width=24",
    "network.depth=1",
    "network.heads=2",
    "network.decoder_width=12",
    "network.decoder_depth=1",
    "network.decoder_heads=2",
    "training.steps_per_round=2",
)
LONGEST_S = 1500.0
"""On an idle machine with 2 cores a run takes about a minute; others may need it, too."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = "faults" in config.option.markexpr or any("faults" in argument for argument in config.args)
    return None if asked else True


@dataclass(frozen=True)
class Undisturbed:
    """The run in which nothing goes wrong, and the hospitals for the others."""

    weights: dict[str, Tensor]
    made: Made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = plain(compose_config([*SMALL, *TINY, f"folder={folder / 'run'}"]))
    with fixed_threads(1), Live() as live:
        first = prepare(settings, live)
        made = Made(first.hospitals, folder / "encodings")
        simulation = prepare(settings, live, made)
        result = simulate(simulation, live, RunObserver())
    return Undisturbed(result.shared, made)


@dataclass
class Disturbed:
    """A consortium under way, in which a test may kill what it likes."""

    poc: Poc
    supervisor: Supervisor
    said: list[str] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        """The run's status; empty before it has one."""
        return read_status(self.poc.run_folder) or {}

    def in_round(self, round: int) -> bool:
        """Whether this round is under way, and all before it are on disk."""
        status = self.status()
        return (status.get("state"), status.get("round")) == ("round", round)

    def see_through(self, on_tick: Callable[[], None]) -> None:
        """Submit the run and see it through; `on_tick` twice a second."""
        end = time.monotonic() + LONGEST_S

        def tick() -> None:
            assert time.monotonic() < end, f"{self.said} {self.status()}"
            self.supervisor.poll()
            on_tick()

        control = Control(self.poc.config)
        Submission(control, self.poc.plan_path, self.poc.run_folder, self.said.append).see_through(tick)

    def weights(self) -> dict[str, Tensor]:
        """The final weights."""
        return load_weights(self.poc.run_folder / "model.safetensors")[0]

    def noted(self, kind: str) -> list[dict[str, Any]]:
        """The lines of this kind in the run's journal, which must hold."""
        entries = Journal(self.poc.run_folder / "journal.jsonl").entries()
        return [entry.record for entry in entries if entry.record["kind"] == kind]

    def is_as(self, undisturbed: Undisturbed) -> bool:
        """Whether it ended in the same bits."""
        own = self.weights()
        return own.keys() == undisturbed.weights.keys() and all(
            torch.equal(own[name], tensor) for name, tensor in undisturbed.weights.items()
        )


@pytest.fixture
def consortium(undisturbed: Undisturbed, tmp_path: Path) -> Iterator[Disturbed]:
    with Live() as live:
        poc = provision(tmp_path, TINY, live, undisturbed.made)
    with poc.running() as supervisor:
        yield Disturbed(poc, supervisor)
