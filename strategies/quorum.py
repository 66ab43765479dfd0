"""Quorum: who is asked, how many must answer, what a straggler costs.

A node is the site that its registration says: at a centre, the one whose key the node proves at every call;
in a simulation, the one that the engine started it as. What a reply says of its site is only checked against
that. Asked are all connected nodes that are a site of the plan. A phase needs valid replies of
ceil(quorum · sites). Everything is bounded: nodes are awaited until the deadline, and for little over a
minute when the quorum is there; replies are awaited until the deadline; a reply after it is never read, and
one of another round is refused. A site that is lost (its process died, its network is gone) is asked again
in the same round while the round waits anyway, and in the next one. Below the quorum the run stops with its
last checkpoint intact; the reasons say who and why. A site answers each place of a plan once: a centre that
went back to an older checkpoint and then averaged other sites asks another question for it, and is refused
for good. Where the quorum cannot be reached without such sites, the run is over, and says so.
What this file does not do: it reads no weights (`strategies/aggregation.py`).
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping

from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from federation.wire.wire import RefusalKind

PATIENCE_S = 90.0
"""How long a round waits for more than the quorum to connect: a SuperNode that was killed is let in again
after 66 s."""


class RoundFailed(RuntimeError):
    """Too few valid replies; `reasons` maps a site (or "node …") to why its reply does not count."""

    def __init__(self, text: str, reasons: Mapping[str, str]) -> None:
        super().__init__(" ".join([text, *(f"{who}: {why}" for who, why in sorted(reasons.items()))]))
        self.reasons = dict(reasons)


class OutOfReach(RoundFailed):
    """The quorum cannot be reached however often this plan is run."""


def refusal(kind: RefusalKind) -> str:
    """Why the reply of a site that refused does not count."""
    return f"refused: {kind.value}"


def needed(quorum: float, num_sites: int) -> int:
    """Valid replies that a phase needs: ceil(quorum · sites), at least one."""
    if not 0 < quorum <= 1:
        raise ValueError(f"Expected aggregation.quorum above 0 and at most 1; got {quorum}.")
    return max(1, math.ceil(quorum * num_sites - 1e-9))


def check_quorum(what: str, valid: int, quorum: float, num_sites: int, reasons: Mapping[str, str]) -> None:
    """Raise `RoundFailed` when fewer than the quorum of sites gave a valid reply; `OutOfReach` when too many
    sites have answered another question in its place for it to be reached later."""
    least = needed(quorum, num_sites)
    if valid >= least:
        return
    came = f"Expected valid replies of {least} of {num_sites} sites to {what}; got {valid}."
    answered = [who for who, why in reasons.items() if why == refusal(RefusalKind.ANSWERED_BEFORE)]
    if num_sites - len(answered) < least:
        raise OutOfReach(
            f"{came} {len(answered)} answered another question in its place before (has the centre gone back "
            "to an older checkpoint?), and a site answers once: publish a new plan.",
            reasons,
        )
    raise RoundFailed(f"{came} The last checkpoint is intact: run again to go on.", reasons)


SiteOf = Callable[[NodeInfo], str]
"""The site that a node is, from what it is registered with; empty when it is none."""


def numbered(node: int, number: int) -> NodeInfo:
    """A node of a simulation, registered under the number of its site in the plan; no site's name has a
    space."""
    return NodeInfo(node_id=node, name=f"site {number}")


def by_number(sites: tuple[str, ...]) -> SiteOf:
    """Who the nodes of a simulation are."""
    names = {numbered(0, number).name: site for number, site in enumerate(sites)}
    return lambda node: names.get(node.name, "")


class Roster:
    """Which node is which site of a run. `site_of` knows it from a node's registration; by default as in a
    simulation, where no node of a deployment is anybody."""

    def __init__(self, sites: tuple[str, ...], site_of: SiteOf | None = None) -> None:
        self.sites = sites
        self._registered = site_of or by_number(sites)
        self._site_of: dict[int, str] = {}

    def asked(self, connected: Iterable[NodeInfo]) -> list[int]:
        """Nodes to ask, in the order of the plan's sites; others are nobody."""
        nodes: dict[str, int] = {}
        for node in connected:
            if (site := self._registered(node)) in self.sites:
                nodes[site] = node.node_id
                self._site_of[node.node_id] = site
        return [nodes[site] for site in self.sites if site in nodes]

    def objection(self, node: int, said: str) -> str | None:
        """Why a reply of `node` that names the site `said` is not to be used, in one line; None when it is
        that site."""
        if (site := self._site_of.get(node)) is None:
            return f"Expected a reply of a registered site of the plan; node {node} is none."
        if said != site:
            return f"Expected a reply of {site!r}, as this node is registered; it says {said[:60]!r}."
        return None

    def name(self, node: int) -> str:
        """The node's site, or "node …" for one that is none."""
        return self._site_of.get(node, f"node {node}")


def wait_for_nodes(
    grid: Grid, roster: Roster, least: int, deadline_s: float, patience_s: float = PATIENCE_S
) -> list[int]:
    """Nodes to ask, as soon as all sites can be asked, or after `patience_s` if at least `least` can.

    Raises `RoundFailed` at the deadline when fewer are connected.
    """
    start = time.monotonic()
    end, patient, pause_s = start + deadline_s, start + min(patience_s, deadline_s), 0.05
    while True:
        asked = roster.asked(grid.get_nodes())
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
