"""Jobs of the benchmark in processes of their own, a few at a time, one thread each.

A job starts when those it comes after have ended, however they ended. What it writes goes to its log; a job
that fails is told by the last line of it and stops no other. An interrupt ends the processes that were
started here; what they had on disk stays.
What this file does not do: it knows nothing of methods and measures.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.files import private_folder

_POLL_S = 0.1
_ROOT = Path(__file__).resolve().parents[2]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process."""

    label: str
    """How it is called; no two have the same."""
    module: str
    """Python module that is run."""
    arguments: tuple[str, ...]
    """Its arguments."""
    log: Path
    """Where its output goes."""
    after: tuple[str, ...] = ()
    """Labels of the jobs that must have ended; those that are not among the jobs count as ended."""


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    on_start: Callable[[Job], None],
    on_end: Callable[[Job, str | None], None],
) -> None:
    """Run all jobs, at most `workers` at a time; `on_end` gets a failed job's error in one line, else None.

    Jobs come after jobs before them in the list, so that each can start some day.
    """
    waiting, running = list(jobs), dict[str, tuple[Job, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            for label, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[label]
                    on_end(job, None if process.returncode == 0 else _error(job.log, process.returncode))
            pending = {job.label for job in waiting} | set(running)
            ready = [job for job in waiting if not pending & set(job.after)]
            assert ready or running or not waiting
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                on_start(job)
                running[job.label] = (job, _start(job))
            time.sleep(_POLL_S if running else 0)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(job: Job) -> "subprocess.Popen[bytes]":
    private_folder(job.log.parent)
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": path}
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", job.module, *job.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _error(log: Path, code: int) -> str:
    """The last line that is not empty; that of a traceback is the exception."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1].strip() if lines else "nothing was said"
    return f"killed by signal {-code}; last said: {said}" if code < 0 else said
