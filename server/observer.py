"""Who is told what happens in rounds, whatever the sites are asked in them.

What this file does not do: it tells nobody; it is the base of those who are told.
"""

from collections.abc import Mapping
from typing import Any


class RoundObserver:
    """Told what happens; this one does nothing. What it is given is the run's own: read, do not write."""

    def on_round_start(self, round_number: int, num_rounds: int) -> None:
        """A round begins."""

    def on_site_reply(self, round_number: int, site: str, report: Mapping[str, Any]) -> None:
        """A site's valid reply is in: examples, seconds, bytes, losses."""

    def on_round_end(
        self, round_number: int, shared: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """A round is aggregated, not yet on disk. What is returned becomes the round's "probes"."""
        return {}

    def on_complete(self) -> None:
        """The last round is over and its weights are on disk."""
