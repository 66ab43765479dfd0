"""`meduet-server journal show | verify`: what crossed, who was asked, and whether the record is whole.

What it does not do: any of the work; see `federation/journal.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.journal import journal_lines, journal_verdict, read_journal
from federation.terminal import say


def add_to(commands: Any) -> None:
    """Add `journal` and its own commands to the parser of `meduet-server`."""
    about = "read the journal of a run or of the authority, and check that nobody changed it"
    journal = commands.add_parser("journal", help=about, description=about.capitalize() + ".")
    actions = journal.add_subparsers(title="what to do", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="one line per event", description="One line per event.")
    show.add_argument("--full", action="store_true", help="every field")
    show.set_defaults(run=_show)
    about = "find any edit, removal or reordering"
    verify = actions.add_parser("verify", help=about, description=about.capitalize() + ".")
    verify.add_argument(
        "--head", default="", metavar="HASH", help="hash of a line, kept elsewhere, that must still be there"
    )
    verify.set_defaults(run=_verify)
    for action in (show, verify):
        action.add_argument("folder", type=Path, metavar="DIR", help="folder of a run, or of the authority")


def _show(chosen: argparse.Namespace, console: Console) -> None:
    say(console, *journal_lines(read_journal(chosen.folder / "journal.jsonl"), chosen.full))


def _verify(chosen: argparse.Namespace, console: Console) -> None:
    path = chosen.folder / "journal.jsonl"
    say(console, *journal_verdict(path, read_journal(path, chosen.head), chosen.head))
