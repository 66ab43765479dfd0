"""What a person sees while a simulation runs: one line per thing that takes time (Rich)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from client.site import SiteProgress
from federation.plan import RunPlan
from federation.terminal import say, terminal
from simulations.hospitals.phantom import Progress as MakeProgress


class Live:
    """Bars for hospitals, encoding, rounds and local steps; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or terminal(stderr=True),
        )
        self._rounds: Any = None
        self._steps: Any = None
        self._diffusion: Any = None

    def __enter__(self) -> "Live":
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take them down."""
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        say(self._bars.console, text)

    def begin(self, plan: RunPlan) -> None:
        """Say in words what is about to run."""
        training = plan.training
        self.say(
            f"{plan.name}  plan {plan.sha256[:12]}  {len(plan.sites)} hospitals  "
            f"{training.rounds} rounds of {training.steps_per_round} steps  {plan.aggregation.method}"
        )
        self._num_steps = training.steps_per_round

    @contextmanager
    def counting(self, what: str) -> Iterator[MakeProgress]:
        """A bar for something counted as (done, total)."""
        task = self._bars.add_task(what, total=None)
        yield lambda done, total: self._bars.update(task, completed=done, total=total)
        self._bars.remove_task(task)

    @contextmanager
    def reading(self, site: str) -> Iterator[SiteProgress]:
        """A bar for a hospital that reads and encodes its scans."""
        task = self._bars.add_task(f"{site}: reading", total=None)

        def update(what: str, done: int, total: int) -> None:
            self._bars.update(task, description=f"{site}: {what}", completed=done, total=total)

        yield update
        self._bars.remove_task(task)

    def on_round(self, round_number: int, num_rounds: int) -> None:
        """A round begins."""
        if self._rounds is None:
            self._rounds = self._bars.add_task("rounds", total=num_rounds, completed=round_number - 1)
            self._steps = self._bars.add_task("local steps", total=self._num_steps)
        self._bars.update(self._rounds, completed=round_number - 1)

    def on_diffusion(self, done: int, total: int, loss: float) -> None:
        """The diffusion model is trained on, after the last round."""
        if self._diffusion is None:
            self._diffusion = self._bars.add_task("diffusion", total=total)
        self._bars.update(self._diffusion, description=f"diffusion, loss {loss:.2f}", completed=done)

    def on_step(self, site: str, step: int, loss: float) -> None:
        """A site took a step."""
        if self._steps is not None:
            self._bars.update(self._steps, description=f"{site}: steps, loss {loss:.2f}", completed=step)

    def on_round_end(self, round_number: int, report: Mapping[str, Any], probes: Mapping[str, float]) -> None:
        """A round is over: its losses, and what was probed."""
        loss = report["loss"]
        words = [
            f"round {round_number:3d}",
            f"loss {loss['total']:6.3f}",
            f"reconstruction {loss['reconstruction']:.3f}",
        ]
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
        self._bars.update(self._rounds, completed=round_number)
