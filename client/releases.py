"""The register of a hospital: everything that left it, from its own books.

One row for each release in the journal: what, when, its hash, to whom, under which plan, who had approved it,
and what the ledger charged. Does not do: say what was made of it elsewhere, or read a scan.
"""

from typing import Any

from client.books.books import JOURNAL, LEDGER
from client.connection.keys import SiteKeys
from client.settings import SiteConfig, approvals_of
from federation.journal import read_journal
from privacy.chain import read_chain


def releases_of(config: SiteConfig) -> list[dict[str, Any]]:
    """The releases of a site, oldest first, as plain values.

    `epsilon` is what the ledger charged for it, None where it left without noise. `approved_by`: who approves
    the plan now; `expires`: the last day of its use, by the plan where it was looked at here. Raises
    `ValueError` when there is no journal, and `BrokenChain` when a book was changed.
    """
    entries = read_journal(config.state_dir / JOURNAL)
    charged = {e.sha256: e.record for e in read_chain(config.state_dir / LEDGER, "ledger")}
    approvals = approvals_of(config)
    known = {one.sha256: one.plan for one in approvals.kept()}
    to = SiteKeys.open(config.keys_dir).connection.consortium if config.keys_dir else "the centre"
    return [
        {
            "utc": e.utc,
            "kind": e.record["kind"],
            "round": e.record.get("round", 0),
            "bytes": e.record.get("bytes", 0),
            "sha256": e.record["sha256"],
            "to": to,
            "plan_sha256": e.record["plan"],
            "plan": known[sha256].name if (sha256 := e.record["plan"]) in known else sha256[:12],
            "expires": known[sha256].release.expires if sha256 in known else "",
            "approved_by": sorted(approvals.approvers(e.record["plan"])),
            "promise": e.record["promise"],
            "epsilon": _epsilon(charged.get(e.record["ledger"], {})),
        }
        for e in entries
        if "ledger" in e.record and "sha256" in e.record
    ]


def _epsilon(record: dict[str, Any]) -> float | None:
    epsilon = record.get("epsilon")
    return float(epsilon) if isinstance(epsilon, int | float) else None
