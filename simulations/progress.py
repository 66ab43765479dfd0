"""What a person sees while a simulation runs: one line per thing that takes time (Rich).

A terminal shows bars. Where the output goes to a file or a pipe, which no bar can move, a line says every few
seconds what is under way, how far it is, and how long it will still take at the pace so far.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from client.site_scans import SiteProgress
from federation.plan.plan import RunPlan
from federation.terminal import say, terminal
from simulations.hospitals.phantom import Progress as MakeProgress
from simulations.pulse import PULSE_S, Clock, Pulse


class _LeftColumn(TextColumn):
    """The time left of a bar."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """As `clocked`; nothing while nobody knows."""
        left = left_s(task)
        return Text("" if left is None else f"{clocked(left)} left", style="progress.remaining")


class Live:
    """Bars for hospitals, encoding, rounds and local steps; a context manager.

    `clock` and `pulse_s`: seconds as they are told, and of silence after which a line is due.
    """

    def __init__(
        self, console: Console | None = None, clock: Clock = time.monotonic, pulse_s: float = PULSE_S
    ) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _LeftColumn(),
            console=console or terminal(stderr=True),
            get_time=clock,
        )
        self._clock, self._began = clock, clock()
        self.pulse = Pulse(self._tell, clock, pulse_s)
        self._plan: RunPlan | None = None
        self._rounds: TaskID | None = None
        self._round = 0
        self._diffusion: TaskID | None = None
        self._turns: dict[str, TaskID] = {}
        self._steps: dict[str, int] = {}
        self._lock = RLock()  # sites side by side tell of themselves in threads of their own

    def __enter__(self) -> "Live":
        """Show the bars."""
        self._bars.start()
        if not self._bars.console.is_terminal:
            self.pulse.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take them down."""
        self.pulse.__exit__()
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        say(self._bars.console, text)
        self.pulse.beat()

    def begin(self, plan: RunPlan) -> None:
        """Say in words what is about to run."""
        training = plan.training
        self.say(
            f"{plan.name}  plan {plan.sha256[:12]}  {len(plan.sites)} hospitals  "
            f"{training.rounds} rounds of {training.steps_per_round} steps  {plan.aggregation.method}"
            + (f"  then {apart} of noisy steps" if (apart := plan.num_rounds - training.rounds) else "")
        )
        self._plan = plan

    @contextmanager
    def counting(self, what: str, total: int | None = None) -> Iterator[MakeProgress]:
        """A bar for something counted as (done, total); `total` where it is known before."""
        task = self._add(what, total)
        try:
            yield lambda done, total: self._bars.update(task, completed=done, total=total)
        finally:
            self._bars.remove_task(task)

    @contextmanager
    def reading(self, site: str) -> Iterator[SiteProgress]:
        """A bar for a hospital that reads and encodes its scans."""
        task = self._add(f"{site}: reading")
        doing = "reading"

        def update(what: str, done: int, total: int) -> None:
            nonlocal doing
            if what != doing:  # another thing, at another pace
                doing = what
                self._bars.reset(task)
            self._bars.update(task, description=f"{site}: {what}", completed=done, total=total)

        try:
            yield update
        finally:
            self._bars.remove_task(task)

    def on_turn(self, site: str, what: str, begins: bool) -> None:
        """A site begins its answer to a question, or has given it."""
        with self._lock:
            if not begins:
                self._bars.remove_task(self._turns.pop(site))
                return
            self._turns[site] = self._add(f"{site}: {what}")
            self._steps[site] = 0

    def on_round(self, round_number: int, num_rounds: int) -> None:
        """A round begins."""
        with self._lock:
            if self._rounds is None:
                self._rounds = self._add("rounds", num_rounds, round_number - 1)
            self._round, self._steps = round_number, {}
            self._bars.update(self._rounds, completed=round_number - 1)

    def on_diffusion(self, done: int, total: int, loss: float) -> None:
        """The diffusion model is trained on, after the last round."""
        with self._lock:
            if self._diffusion is None:
                self._diffusion = self._add("diffusion", total)
            self._bars.update(self._diffusion, description=f"diffusion, loss {loss:.2f}", completed=done)
            if done >= total:
                self._bars.remove_task(self._diffusion)
                self._diffusion = None

    def on_step(self, site: str, step: int, loss: float) -> None:
        """A site took a step."""
        with self._lock:
            if self._plan is None or site not in self._turns:
                return
            num_steps = self._plan.steps_in(self._round)
            self._steps[site] = step
            text = f"{site}: noisy steps" if math.isnan(loss) else f"{site}: steps, loss {loss:.2f}"
            self._bars.update(self._turns[site], description=text, completed=step, total=num_steps)
            if self._rounds is not None and self._round:
                share = sum(self._steps.values()) / (num_steps * len(self._plan.participants))
                self._bars.update(self._rounds, completed=self._round - 1 + min(share, 1.0))

    def on_round_end(self, round_number: int, report: Mapping[str, Any], probes: Mapping[str, float]) -> None:
        """A round is over: its losses, and what was probed."""
        loss = report["loss"]
        words = [f"round {round_number:3d}"]
        if report.get("burnt"):
            words.append("burnt: the sum could not be opened, the weights stay")
        elif not loss:
            words.append("noisy steps: no loss is told")
        else:
            words += [f"loss {loss['total']:6.3f}", f"reconstruction {loss['reconstruction']:.3f}"]
        for name, label in (
            ("site_from_content", "hospital from content"),
            ("site_from_style", "from style"),
            ("patient_from_content", "patient from content"),
            ("style_gap_closed", "style gap closed"),
        ):
            if name in probes:
                words.append(f"{label} {probes[name]:.2f}")
        trained = report.get("diffusion", {})
        if "loss" in trained:
            words.append(f"diffusion loss {trained['loss']:.3f} on {trained['items']} latents")
        words.append(f"{report['seconds']:.1f} s")
        self.say("  ".join(words))
        with self._lock:
            assert self._rounds is not None and self._plan is not None
            self._bars.update(self._rounds, completed=round_number)
            self._round = 0
            if round_number == self._plan.num_rounds:
                self._bars.remove_task(self._rounds)
                self._rounds = None

    def under_way(self) -> list[tuple[str, str, str, str]]:
        """What takes time now: what it is, how much is done, of how much, the time left where it is known."""
        with self._lock:
            tasks = self._bars.tasks
        rows = []
        for task in tasks:
            left, total = left_s(task), "" if task.total is None else f"{task.total:g}"
            done = f"{round(task.completed, 2):.10g}" if total else ""
            rows.append((task.description, done, total, "" if left is None else clocked(left)))
        return rows

    def _add(self, what: str, total: int | None = None, done: int = 0) -> TaskID:
        return self._bars.add_task(what, total=total, completed=done, first=done)

    def _tell(self) -> None:
        """One line: what is under way, and when the longest of it will be done."""
        with self._lock:
            tasks = self._bars.tasks
        parts = [_told(task) for task in tasks] or ["working"]
        known = [left for task in tasks if (left := left_s(task)) is not None]
        when = f"about {clocked(max(known))} left" if known else "time left not known yet"
        say(self._bars.console, f"{clocked(self._clock() - self._began)}  {'; '.join(parts)}; {when}")


def left_s(task: Task) -> float | None:
    """Seconds that a bar still takes at its pace so far; None while nobody knows."""
    done = task.completed - task.fields["first"]
    if task.total is None or not 0 < done < task.total - task.fields["first"] or task.elapsed is None:
        return None
    left: float = task.elapsed * (task.total - task.completed) / done
    return left


def clocked(seconds: float) -> str:
    """Minutes and seconds, as a clock shows them."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _told(task: Task) -> str:
    return (
        task.description
        if task.total is None
        else f"{task.description} {round(task.completed, 2):.10g} of {task.total:g}"
    )
