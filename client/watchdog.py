"""The watchdog: a process that hangs past the plan's deadline ends, so that the site is there for the next
round.

Flower hands a site one question at a time and waits for the answer without limit: one hung process would
leave the hospital out for ever. A round of training looks at the clock after each step (`client/answers.py`);
this is for what never comes to look: a disk that does not answer, a library that waits for a lock. The clock
is a C thread that needs nothing of Python's, and what it leaves in the site's log is where every thread
stood.

Does not do: answer. The centre gave up at the deadline; it reads the next reply, not this one.
"""

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

GRACE_S = 30.0
"""Seconds after the deadline: a round that looks at the clock says so itself, in an orderly way."""

Watch = Callable[[Path, float], AbstractContextManager[None]]
"""Called with the site's log file and the plan's deadline in seconds; around the work of an answer."""


@contextmanager
def watchdog(log: Path, deadline_s: float, grace_s: float = GRACE_S) -> Iterator[None]:
    """End this process (exit 1) if what is inside takes longer than `deadline_s` and the grace.

    One at a time per process: Python has one such clock.
    """
    with log.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(deadline_s + grace_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def unwatched(log: Path, deadline_s: float) -> Iterator[None]:
    """No watchdog: where several sites share a process, none may end it."""
    yield
