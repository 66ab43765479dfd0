"""The watchdog: what hangs ends, even where Python itself cannot run; what ends in time is left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.watchdog import unwatched, watchdog

ROOT = Path(__file__).resolve().parents[2]


def hang(log: Path, how: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import ctypes, pathlib, time\nfrom client.watchdog import watchdog\n"
        f"with watchdog(pathlib.Path({str(log)!r}), 0.2, 0.1): {how}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True, text=True, check=False
    )


# the second holds Python's global lock: no thread of Python's could end it
@pytest.mark.parametrize("how", ["time.sleep(300)", "ctypes.PyDLL(None).sleep(300)"])
def test_a_process_that_hangs_ends_and_leaves_where_it_stood_in_the_log(tmp_path: Path, how: str) -> None:
    log = tmp_path / "site.log"
    log.write_text("before\n")
    done = hang(log, how)
    assert done.returncode == 1
    assert done.stdout + done.stderr == ""  # Flower would carry it away
    assert log.read_text().startswith("before\nTimeout (0:00:00")
    assert "most recent call first" in log.read_text()


def test_what_ends_in_time_or_raises_is_left_alone(tmp_path: Path) -> None:
    with watchdog(tmp_path / "site.log", 0.05, 0.05):
        pass
    with pytest.raises(KeyError), watchdog(tmp_path / "site.log", 0.05, 0.05):
        raise KeyError
    time.sleep(0.3)  # this process lives
    assert (tmp_path / "site.log").read_text() == ""


def test_without_a_watchdog_nothing_is_written(tmp_path: Path) -> None:
    with unwatched(tmp_path / "site.log", 0.0):
        time.sleep(0.05)
    assert not (tmp_path / "site.log").exists()
