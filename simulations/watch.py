"""The page of a simulation while it runs: what is under way, and the run as `meduet-server watch` shows it.

Served from the first second, before there is a run to show. Does not do: serve (`federation/watching.py`), or
know a run's files (`server/deployment/watch.py`); it imports nothing that takes seconds.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from federation.watching import Section, Watched

if TYPE_CHECKING:
    from simulations.progress import Live


class SimulationPage:
    """What is to be seen of the simulation `name`, in any of its stages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._live: Live | None = None
        self._run: Callable[[], Watched] | None = None

    def show_work(self, live: "Live") -> None:
        """From now on, show what is under way."""
        self._live = live

    def show_run(self, run: Callable[[], Watched]) -> None:
        """From now on, there is a run to show, too."""
        self._run = run

    def look(self) -> Watched:
        """The simulation now. Raises `ValueError` when its run cannot be read."""
        work = [] if self._live is None else self._live.under_way()
        now = Section("Under way", ("what", "done", "of", "left"), work)
        if self._run is None:
            state = "loading libraries" if self._live is None else "before the first round"
            return Watched(self._name, state, [now], [])
        seen = self._run()
        return dataclasses.replace(seen, sections=[now, *seen.sections])
