"""The watchdog: an answer that does not come in time is given up, and a process that hangs ends.

Flower hands a site one question at a time and waits for the answer without limit: one hung process would
leave the hospital out for ever. A round of training looks at the clock after each step
(`client/exchanges/exchange.py`); this is for what never comes to look: a disk that does not answer, a library
that waits for a lock. The work is done in a thread of its own, and the main thread waits for nine tenths of
the plan's deadline; then the site says `deadline` while the centre still listens, and its log says where
every thread stood. A C-level clock, which needs nothing of Python's, ends the process in any case: when the
hang holds Python's global lock, or lets no process exit. A process that exits with its answer still at work
does so at once: Python's own ending would abort it in the middle of PyTorch, and a core dump holds patients'
latents.

An answer that was given up can no longer leave: whoever lets something out asks `may_leave` first
(`client/release.py`), and from then on the main thread waits for it to the end. Does not do: send the
refusal (`client/app.py`), or guard the reading of site.yaml, before which no deadline is known.
"""

import atexit
import faulthandler
import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import ContextVar, copy_context
from pathlib import Path
from threading import Lock, Thread
from typing import Protocol, TypeVar, runtime_checkable

import torch

DEADLINE_SHARE = 0.9
"""Share of the plan's deadline after which a site gives up: what is left is for saying so."""

GRACE_S = 30.0
"""Seconds after the deadline at which the process ends: time to hand the refusal over."""

Answer = TypeVar("Answer")


class DeadlineMissed(RuntimeError):
    """The answer did not come in time, and will not be let out."""


@runtime_checkable
class Watch(Protocol):
    """Around the work of an answer."""

    def __call__(self, log: Path, deadline_s: float, work: Callable[[], Answer], /) -> Answer:
        """What `work` gives, or raises. `log`: the site's log file; `deadline_s`: seconds left of the
        plan's."""


class _Turn:
    """Who was first: the answer on its way out, or the main thread that gave it up."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._leaving = self._given_up = False

    def leave(self) -> bool:
        with self._lock:
            self._leaving = not self._given_up
            return self._leaving

    @property
    def given_up(self) -> bool:
        return self._given_up

    def give_up(self) -> bool:
        with self._lock:
            self._given_up = not self._leaving
            return self._given_up


_turn: ContextVar[_Turn | None] = ContextVar("_turn", default=None)


def may_leave() -> bool:
    """Whether what this thread works on is still waited for; if so, it will be waited for from now on."""
    turn = _turn.get()
    return turn is None or turn.leave()


def is_waited_for() -> bool:
    """Whether somebody still waits for what this thread works on: to be asked while waiting for another
    program."""
    turn = _turn.get()
    return turn is None or not turn.given_up


def watchdog(log: Path, deadline_s: float, work: Callable[[], Answer], /, grace_s: float = GRACE_S) -> Answer:
    """What `work` gives, or raises, in a thread of its own.

    Raises `DeadlineMissed` after `DEADLINE_SHARE * deadline_s` seconds, unless the answer is on its way out;
    the process then ends (exit 1) at `deadline_s + grace_s`, if it has not by itself. One at a time per
    process: Python has one such clock.
    """
    atexit.register(gc.freeze)  # .8 s of looking for cycles among what is given up with the process anyway
    turn, done, threads = _Turn(), Future[Answer](), torch.get_num_threads()

    def answer() -> None:
        _turn.set(turn)
        torch.set_num_threads(threads)  # a number of each thread
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001, it is raised again in the thread that waits
            done.set_exception(error)

    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)  # open as long as the clock runs
    faulthandler.dump_traceback_later(deadline_s + grace_s, exit=True, file=file)
    thread = Thread(target=copy_context().run, args=(answer,), name="answer", daemon=True)
    thread.start()
    try:
        wait([done], DEADLINE_SHARE * deadline_s)
        if not done.done() and turn.give_up():
            faulthandler.dump_traceback(file, all_threads=True)
            raise DeadlineMissed(
                f"Expected an answer within {DEADLINE_SHARE:g} of what was left of aggregation.deadline_s "
                f"({deadline_s:.1f} s); where every thread stood is above."
            )
        return done.result()
    except BaseException:
        turn.give_up()  # an interrupt, too
        if not done.done():
            atexit.register(_end_with, thread)
        raise
    finally:
        if done.done():
            faulthandler.cancel_dump_traceback_later()
            os.close(file)


def _end_with(thread: Thread) -> None:
    """End the process now if `thread` is still at work."""
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def unwatched(log: Path, deadline_s: float, work: Callable[[], Answer], /) -> Answer:
    """No watchdog: where several sites share a process, none may end it."""
    return work()
