"""What dies at the centre costs time and no completed round: the run ends in the bits it would have had.

Time to recover is printed with `-s`.
"""

import os
import signal
import time
from typing import Any

import pytest

from federation.processes import read_state

pytestmark = pytest.mark.faults


def test_the_server_application_is_killed_in_round_2(consortium: Any, undisturbed: Any) -> None:
    killed: list[float] = []

    def kill() -> None:
        if not killed and consortium.in_round(2):
            os.kill(consortium.status()["pid"], signal.SIGKILL)
            killed.append(time.monotonic())
        if len(killed) == 1 and consortium.status().get("resumed", 0) > 0:
            killed.append(time.monotonic())

    consortium.see_through(kill)
    assert len(killed) == 2
    assert consortium.is_as(undisturbed)
    assert [line["round"] for line in consortium.noted("round")] == [1, 2]  # none was lost, none done twice
    resumed = [line["round"] for line in consortium.noted("resume")]
    assert resumed and set(resumed) == {
        1
    }  # more than once on a machine so busy that Flower's heartbeats fail
    assert sum("submitted" in line for line in consortium.said) >= 2
    tell(f"server application killed: running again after {killed[1] - killed[0]:.0f} s")


def test_superlink_is_killed_in_round_2_and_away_for_8_seconds(consortium: Any, undisturbed: Any) -> None:
    centre, state_dir = consortium.supervisor.pid("centre"), consortium.poc.config.state_dir
    away: list[float] = []

    def kill() -> None:
        if not away and consortium.in_round(2):
            os.kill(centre, signal.SIGSTOP)  # or it would be there again after a second
            state = read_state(state_dir)
            assert state is not None
            os.kill(state["processes"]["superlink"]["pid"], signal.SIGKILL)
            away.append(time.monotonic())
        if len(away) == 1 and time.monotonic() - away[0] >= 8.0:
            os.kill(centre, signal.SIGCONT)
            away.append(time.monotonic())

    consortium.see_through(kill)
    assert len(away) == 2
    state = read_state(state_dir)
    assert state is not None and state["processes"]["superlink"]["restarts"] == 1
    assert consortium.is_as(undisturbed)
    assert [line["round"] for line in consortium.noted("round")] == [1, 2]
    tell(f"SuperLink away for {away[1] - away[0]:.0f} s: {len(consortium.noted('resume'))} resubmissions")


def tell(line: str) -> None:
    os.write(1, (line + "\n").encode())
