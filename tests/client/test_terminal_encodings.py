"""Output survives a terminal that is not UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_check_says_everything_on_a_terminal_that_is_not_utf_8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "Müller").mkdir()
    (tmp_path / "site.yaml").write_text(
        "name: north\ndata_root: Müller\nstate_dir: state\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "client.cli", "check", "--config", str(tmp_path / "site.yaml")],
        env={**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"is the folder mounted?" in done.stdout


def test_help_is_shown_on_a_terminal_that_is_not_utf_8() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
