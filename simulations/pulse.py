"""The pulse of a command: a line every few seconds, so that nobody wonders whether it hangs.

A thread looks whether something was said lately; if not, it says what is under way. What counts as said is
told by whoever says it. Imports nothing that takes time, since it also beats while libraries are loaded.
"""

import threading
import time
from collections.abc import Callable

PULSE_S = 4.0
"""Seconds of silence after which a line is due."""
_LOOK_S = 0.25

Clock = Callable[[], float]


class Pulse:
    """Calls `tell` after `pulse_s` seconds in which nobody called `beat`; a context manager."""

    def __init__(
        self,
        tell: Callable[[], None],
        clock: Clock = time.monotonic,
        pulse_s: float = PULSE_S,
        look_s: float = _LOOK_S,
    ) -> None:
        self._tell, self._clock, self._pulse_s, self._look_s = tell, clock, pulse_s, look_s
        self._last = clock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Pulse":
        """Begin to look; again, if it had stopped."""
        self._over.clear()
        self.beat()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop looking."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self) -> None:
        """Something was said."""
        self._last = self._clock()

    def look(self) -> None:
        """Say what is under way, if nothing was said for long enough."""
        if self._clock() - self._last >= self._pulse_s:
            self.beat()
            self._tell()

    def _run(self) -> None:
        while not self._over.wait(self._look_s):
            self.look()
