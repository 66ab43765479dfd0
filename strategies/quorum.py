"""Quorum: who is asked, how many must answer, what a straggler costs.

Asked are all connected nodes that are a site of the plan, or may be one. A phase needs valid replies of
ceil(quorum · sites). Everything is bounded: nodes are awaited until the deadline, and for little over a
minute when the quorum is there; replies are awaited until the deadline; a reply after it is never read, and
one of another round is refused. A site that is lost (its process died, its network is gone) is asked again
in the same round while the round waits anyway, and in the next one. Below the quorum the run stops with its
last checkpoint intact; the reasons say who and why.
What this file does not do: it reads no weights (`strategies/aggregation.py`).
"""

import math
import time
from collections.abc import Mapping

from flwr.serverapp import Grid

PATIENCE_S = 90.0
"""How long a round waits for more than the quorum to connect: a SuperNode that was killed is let in again
after 66 s."""


class RoundFailed(RuntimeError):
    """Too few valid replies; `reasons` maps a site (or "node …") to why its reply does not count."""

    def __init__(self, text: str, reasons: Mapping[str, str]) -> None:
        super().__init__(" ".join([text, *(f"{who}: {why}" for who, why in sorted(reasons.items()))]))
        self.reasons = dict(reasons)


def needed(quorum: float, num_sites: int) -> int:
    """Valid replies that a phase needs: ceil(quorum · sites), at least one."""
    if not 0 < quorum <= 1:
        raise ValueError(f"Expected aggregation.quorum above 0 and at most 1; got {quorum}.")
    return max(1, math.ceil(quorum * num_sites - 1e-9))


def check_quorum(what: str, valid: int, quorum: float, num_sites: int, reasons: Mapping[str, str]) -> None:
    """Raise `RoundFailed` when fewer than the quorum of sites gave a valid reply."""
    least = needed(quorum, num_sites)
    if valid < least:
        raise RoundFailed(
            f"Expected valid replies of {least} of {num_sites} sites to {what}; got {valid}. The last "
            "checkpoint is intact: run again to go on.",
            reasons,
        )


class Roster:
    """Which node is which site, as the nodes' replies say; a node keeps its name for the whole run."""

    def __init__(self, sites: tuple[str, ...]) -> None:
        self.sites = sites
        self._site_of: dict[int, str] = {}
        self._strangers: set[int] = set()

    def bind(self, node: int, site: str) -> str | None:
        """Note that `node` says it is `site`; why it cannot be, in one line, or None when it can."""
        if site not in self.sites:
            if node not in self._site_of:
                self._strangers.add(node)
            return f"Expected a site of the plan; got {site[:60]!r}."
        if (known := self._site_of.get(node, site)) != site:
            return f"Expected node {node} to be {known!r} as before; it now says {site!r}."
        for other, taken in self._site_of.items():
            if taken == site and other != node:
                return f"Expected one node per site; {site!r} is node {other} already."
        self._site_of[node] = site
        return None

    def name(self, node: int) -> str:
        """The node's site, or "node …" as long as it has not said."""
        return self._site_of.get(node, f"node {node}")

    def asked(self, connected: list[int]) -> list[int]:
        """Nodes to ask, in the order of the plan's sites, then those that have not said who they are.

        When every site is known, nobody else is asked.
        """
        known = {site: node for node, site in self._site_of.items() if node in connected}
        first = [known[site] for site in self.sites if site in known]
        if len(first) == len(self.sites):
            return first
        return first + sorted(set(connected) - set(self._site_of) - self._strangers)


def wait_for_nodes(
    grid: Grid, roster: Roster, least: int, deadline_s: float, patience_s: float = PATIENCE_S
) -> list[int]:
    """Nodes to ask, as soon as all sites can be asked, or after `patience_s` if at least `least` can.

    Raises `RoundFailed` at the deadline when fewer are connected.
    """
    start = time.monotonic()
    end, patient, pause_s = start + deadline_s, start + min(patience_s, deadline_s), 0.05
    while True:
        asked = roster.asked(list(grid.get_node_ids()))
        if len(asked) >= len(roster.sites) or (len(asked) >= least and time.monotonic() >= patient):
            return asked
        if time.monotonic() >= end:
            break
        time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
        pause_s = min(2 * pause_s, 2.0)
    raise RoundFailed(
        f"Expected at least {least} connected sites within {deadline_s:g} s; got {len(asked)}. "
        "Start the sites, then run again.",
        {},
    )
