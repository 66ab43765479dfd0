"""Processes a few at a time: order kept, failures told, nobody stopped by another's."""

import signal
import textwrap
from pathlib import Path

import pytest

from simulations.benchmark.jobs import Job, run_jobs

SCRIPT = """
    import os, sys, time
    from pathlib import Path
    what, folder = sys.argv[1], Path(sys.argv[2])
    (folder / (what + ".began")).write_text(str(time.monotonic()))
    if what == "fails":
        raise ValueError("Expected more; got less.")
    if what == "killed":
        print("so far", flush=True)
        os.kill(os.getpid(), 9)
    if what == "slow":
        time.sleep(60)
    time.sleep(0.2)
    (folder / (what + ".ended")).write_text(str(time.monotonic()))
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toil.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def job(folder: Path, what: str, *after: str) -> Job:
    log = folder / "logs" / f"{what}.log"
    return Job(label=what, module="toil", arguments=(what, str(folder)), log=log, after=after)


def run(jobs: list[Job], workers: int) -> dict[str, str | None]:
    ended: dict[str, str | None] = {}
    running: set[str] = set()

    def on_start(job: Job) -> None:
        running.add(job.label)
        assert len(running) <= workers

    def on_end(job: Job, error: str | None) -> None:
        running.remove(job.label)
        ended[job.label] = error

    run_jobs(jobs, workers, on_start, on_end)
    return ended


def test_failures_are_told_in_one_line_and_stop_nobody(folder: Path) -> None:
    names = ("fails", "killed", "c", "d")
    ended = run([job(folder, name) for name in names], workers=2)
    assert ended["fails"] == "ValueError: Expected more; got less."
    assert ended["killed"] == f"killed by signal {int(signal.SIGKILL)}; last said: so far"
    assert ended["c"] is None and ended["d"] is None


def test_a_job_waits_for_those_it_comes_after_even_if_they_fail(folder: Path) -> None:
    ended = run([job(folder, "a"), job(folder, "b", "a", "not-there"), job(folder, "c", "fails"),
                 job(folder, "fails")], workers=3)  # fmt: skip
    assert list(ended).index("b") > list(ended).index("a") and set(ended) == {"a", "b", "c", "fails"}
    a_ended, b_began, c_began, failing = (
        float((folder / name).read_text()) for name in ("a.ended", "b.began", "c.began", "fails.began")
    )
    assert a_ended < b_began and failing < c_began


def test_an_interrupt_ends_what_was_started_here(folder: Path) -> None:
    def interrupt(job: Job, error: str | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(folder, "slow"), job(folder, "a")], 2, lambda job: None, interrupt)
    assert not (folder / "slow.ended").exists()
