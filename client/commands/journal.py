"""`meduet-site journal show | verify`: what left this hospital, and whether the record of it is whole.

What it does not do: any of the work; see `federation/journal.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.terminal import DONE, failing, say


def add_to(commands: Any) -> None:
    """Add `journal` and its own commands to the parser of `meduet-site`."""
    about = "read what left this site, and check that nobody changed the record"
    journal = commands.add_parser("journal", help=about, description=about.capitalize() + ".")
    actions = journal.add_subparsers(title="what to do", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="one line per release", description="One line per release.")
    show.add_argument("--full", action="store_true", help="every field")
    show.set_defaults(run=_show)
    about = "find any edit, removal or reordering of journal, ledger and approvals"
    verify = actions.add_parser(
        "verify", help=about, description=about.capitalize() + ". Exit status 1 then."
    )
    verify.add_argument(
        "--head", default="", metavar="HASH", help="hash of a line, kept elsewhere, that must still be there"
    )
    verify.set_defaults(run=_verify)
    for action in (show, verify):
        action.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")


def _show(chosen: argparse.Namespace, console: Console) -> int:
    from client.books.books import JOURNAL
    from client.settings import load_site_config
    from federation.journal import journal_lines, read_journal

    entries = read_journal(load_site_config(chosen.config).state_dir / JOURNAL)
    say(console, *journal_lines(entries, chosen.full))
    return DONE


def _verify(chosen: argparse.Namespace, console: Console) -> int:
    from client.books.books import JOURNAL, read_books
    from client.settings import load_site_config
    from federation.journal import journal_verdict
    from privacy.chain import BrokenChain

    state = load_site_config(chosen.config).state_dir
    with failing(BrokenChain):
        books = read_books(state, chosen.head)
    say(console, *journal_verdict(state / JOURNAL, list(books.journal), chosen.head))
    say(console, "The ledger holds every release and every round trained here; approvals are whole.")
    if books.unnamed:
        say(console, f"{books.unnamed} charges are not in the journal: the site was killed just then, or an")
        say(console, "older journal was put back. Compare with the centre's: meduet-server journal show.")
    return DONE
