"""`meduet-site ledger show | close`: what this hospital's patients have been charged, and what is still open.

What it does not do: any of the work; see `privacy/ledger.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.terminal import DONE, say


def add_to(commands: Any) -> None:
    """Add `ledger` and its own commands to the parser of `meduet-site`."""
    about = "what the patients of this site have been charged"
    ledger = commands.add_parser("ledger", help=about, description=about.capitalize() + ".")
    actions = ledger.add_subparsers(title="what to do", metavar="ACTION", required=True)
    about = "epsilon of everything together, and reservations whose answer did not leave"
    show = actions.add_parser("show", help=about, description=about.capitalize() + ".")
    show.set_defaults(run=_show)
    about = "charge a reservation no longer, since nothing left under it"
    close = actions.add_parser("close", help=about, description=about.capitalize() + ".")
    close.add_argument("index", type=int, metavar="INDEX", help="as `ledger show` lists it")
    close.add_argument("--reason", required=True, metavar="TEXT", help="how you know; the ledger keeps it")
    close.set_defaults(run=_close)
    for action in (show, close):
        action.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")


def _show(chosen: argparse.Namespace, console: Console) -> int:
    ledger, ceiling = _opened(chosen.config)
    spent = ledger.spent()
    say(
        console,
        f"Each patient: epsilon {spent.total} (delta {ceiling.delta:g}, add or remove one patient), from "
        f"{spent.num_noised} releases with noise and {spent.num_plain} without; ceiling {ceiling.epsilon:g}.",
    )
    if spent.num_plain and spent.num_noised:
        say(console, f"Those with noise alone: epsilon {spent.noised}.")
    for entry in ledger.open_reservations():
        record = entry.record
        say(
            console,
            f"open {entry.index}: {record['kind']} of round {record['round']} of plan {record['plan'][:12]}, "
            f"reserved {entry.utc}; counted in full",
        )
    return DONE


def _close(chosen: argparse.Namespace, console: Console) -> int:
    ledger, _ = _opened(chosen.config)
    ledger.close(chosen.index, chosen.reason)
    say(console, f"Closed {chosen.index}. No answer leaves under it any more.")
    return _show(chosen, console)


def _opened(config: Path) -> tuple[Any, Any]:
    from client.books.books import LEDGER
    from client.settings import ceiling_of, load_site_config
    from privacy.ledger import Ledger

    site = load_site_config(config)
    ceiling = ceiling_of(site)
    return Ledger(site.state_dir / LEDGER, ceiling), ceiling
