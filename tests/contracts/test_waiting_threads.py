"""Threads of PyTorch that wait for each other sleep: those that spin take a busy machine's cores.

Two threads beside seven other programs on two cores took 12 to 15 times as long when they spun.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST_SEEN = """
import os, sys

class Watching:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit(0)

sys.meta_path.insert(0, Watching())
import MODULE
print(os.environ.get("OMP_WAIT_POLICY"))
"""


def policy(module: str, **variables: str) -> str:
    """What PyTorch and every process below a command find when they are loaded."""
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    script = FIRST_SEEN.replace("MODULE", module)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**inherited, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["client.cli", "client.weights_cli", "server.cli", "simulations.cli"])
def test_every_command_has_waiting_threads_sleep_before_pytorch_is_loaded(module: str) -> None:
    assert policy(module) == "passive"


def test_who_sets_another_policy_keeps_it() -> None:
    assert policy("client.cli", OMP_WAIT_POLICY="active") == "active"
