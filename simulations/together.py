"""Several observers of one run, told one after the other.

What they return is put together; where two give the same name, the later one's stays. Does not do: decide
who observes (`simulations/run.py`).
"""

from collections.abc import Mapping
from typing import Any

from server.app import RunObserver, RunResult


class Together(RunObserver):
    """Tells each of `observers`, in this order."""

    def __init__(self, *observers: RunObserver) -> None:
        self._observers = observers

    def on_survey(self, summary: Mapping[str, Any], style_bank: Mapping[str, Any]) -> None:
        """The survey is done."""
        for one in self._observers:
            one.on_survey(summary, style_bank)

    def on_round_start(self, round_number: int, num_rounds: int) -> None:
        """A round begins."""
        for one in self._observers:
            one.on_round_start(round_number, num_rounds)

    def on_site_reply(self, round_number: int, site: str, report: Mapping[str, Any]) -> None:
        """A site's valid reply is in."""
        for one in self._observers:
            one.on_site_reply(round_number, site, report)

    def on_round_end(
        self, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """A round is aggregated; each is also told, as the metrics' "probes", what those before it found."""
        probes: dict[str, Any] = {}
        for one in self._observers:
            probes |= one.on_round_end(round_number, shared, {**metrics, "probes": dict(probes)})
        return probes

    def on_diffusion(self, done: int, total: int, loss: float) -> None:
        """The diffusion model is trained on."""
        for one in self._observers:
            one.on_diffusion(done, total, loss)

    def on_end(self, result: RunResult) -> Mapping[str, Any]:
        """The run is complete."""
        final: dict[str, Any] = {}
        for one in self._observers:
            final |= one.on_end(result)
        return final
