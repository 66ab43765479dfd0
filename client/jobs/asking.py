"""A row of the table of exchanges whose work is done by a job: asked by a file, answered by a file.

The process of a question keeps what it always kept: the wall, the site's yes, the place in the ledger, the
gate, the books, the watchdog. Between place and gate it writes a request, runs the site's launcher and waits.
What the job leaves is no release: it goes through the gate as what was worked out here would, and the state
of the site after the round becomes the site's only then.

A job that ends without an answer (killed by its scheduler, a node that went down) is asked again, `LAUNCHES`
times in all; a round under way goes on where it was. One that says no is not asked again. When nobody waits
any more its request is removed, at which a job that still runs ends by itself.

Does not do: work (`client/jobs/program.py`), or know any scheduler (`client/jobs/launcher.py`).
"""

import dataclasses
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from client.exchanges.exchange import Answer, OnStep, Site
from client.jobs.launcher import Launcher
from client.jobs.request import ANSWER, STATE, NoAnswer, Offer, Request, read_answer
from client.release import Gate, Released
from client.training.site_state import ROOMS, StateFolder
from client.watchdog import DeadlineMissed, is_waited_for
from federation.plan.plan import RunPlan
from federation.wire.messages import Ask
from privacy.step_secrets import StepSecrets
from storage.files import private_folder

JOBS = "jobs"
"""The folder, in the site's state folder."""
STEPS = "steps"
"""Name of the file in which a job says how far it is: a line of step and loss for each step."""
LAUNCHES = 3
"""How often a question is given to the launcher."""
PAUSE_S = 5.0
"""Seconds before it is given again."""
APPEARS_S = 30.0
"""Seconds in which an answer must show here after its launcher ended well: shared disks take their time."""
_log = logging.getLogger(__name__)


def by_job(row: Answer[Any, Any]) -> Answer[Any, Any]:
    """The same row, its work done by a job of the site's launcher."""

    def work(site: Site, ask: Ask, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
        assert site.launcher is not None, "rows are answered by jobs where there is a launcher"
        masking, keep = (None, _nothing) if row.masking is None else row.masking(site, ask, plan)
        noise = gate.step_secrets() if gate.promise.in_steps else None
        with _folder(site.state_dir / JOBS, ask.plan_sha256) as folder:
            request = _request(row, site.launcher, ask, noise)
            offer = _asked(site.launcher, request, folder, on_step)
            if offer.masked != (masking is not None) or (offer.room and offer.room not in ROOMS):
                raise NoAnswer("Expected an answer of this row; the job's is another's.")
            if noise is not None:
                noise.go_on(offer.noised)

            def keep_all() -> None:
                if offer.room:
                    states = StateFolder(site.state_dir / offer.room, ask.plan_sha256)
                    states.take(folder / STATE, row.exchange.place(plan, ask).round)
                keep()

            return gate.release(**offer.arguments(), keep=keep_all, masking=masking)

    return dataclasses.replace(row, work=work)


def _nothing() -> None:
    """Nothing else to keep."""


def _request(row: Answer[Any, Any], launcher: Launcher, ask: Ask, noise: StepSecrets | None) -> Request:
    return Request(
        route=row.exchange.route,
        message=Request.message_of(ask),
        question=ask.sha256(),
        attempt=secrets.token_hex(8),
        settings=launcher.settings,
        threads=torch.get_num_threads(),
        noise="" if noise is None else noise.to_text(),
    )


@contextmanager
def _folder(jobs: Path, plan_sha256: str) -> Iterator[Path]:
    """A folder for one request; what an earlier question of this plan left behind goes, and its job with
    it."""
    for left in jobs.glob(f"{plan_sha256[:12]}-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = private_folder(jobs / f"{plan_sha256[:12]}-{secrets.token_hex(4)}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _asked(launcher: Launcher, request: Request, folder: Path, on_step: OnStep) -> Offer:
    """The job's offer. Raises `JobRefused`, `NoAnswer`, and `DeadlineMissed` when nobody waits any more."""
    path, steps = request.write(folder), _Steps(folder / STEPS, on_step)

    def look() -> None:
        _still_waited_for()
        steps.tell()

    for launch in range(1, LAUNCHES + 1):
        status = launcher.run(path, look)
        if _appears(folder / ANSWER, APPEARS_S if status == 0 else 0.0):
            return read_answer(folder, request.sha256)
        _log.warning(
            "The launcher ended (%d) and its job left no answer, %d of %d.", status, launch, LAUNCHES
        )
        if launch < LAUNCHES:
            _pause(PAUSE_S, _still_waited_for)
    raise NoAnswer(f"Expected an answer of the job; none came in {LAUNCHES} launches: see above.")


def _still_waited_for() -> None:
    if not is_waited_for():
        raise DeadlineMissed("Expected the job in time; nobody waits for its answer any more.")


def _appears(path: Path, longest_s: float) -> bool:
    _pause(longest_s, _still_waited_for, path.is_file)
    return path.is_file()


def _pause(longest_s: float, look: Callable[[], None], done: Callable[[], bool] = lambda: False) -> None:
    end = time.monotonic() + longest_s
    while not done() and time.monotonic() < end:
        look()
        time.sleep(min(0.2, longest_s))


class _Steps:
    """Tells each step of a job once."""

    def __init__(self, path: Path, on_step: OnStep) -> None:
        self._path, self._on_step, self._told = path, on_step, 0

    def tell(self) -> None:
        """Tell what was written since the last time; a line that is not whole yet waits."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._told)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._told += len(whole)
        for line in whole.decode("ascii", "replace").splitlines():
            step, _, loss = line.partition(" ")
            self._on_step(int(step), float(loss))
