"""`meduet-server audit RUN`: the centre's part of an audit, which needs no patient.

What it does not do: any of the work; see `server/holdings.py` and `audit/`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from audit.options import STATUS, add_policy_option
from federation.terminal import say


def add_to(commands: Any) -> None:
    """Add `audit` to the parser of `meduet-server`."""
    about = "what the centre holds of whom, and whether its book is whole; needs no patient"
    audit = commands.add_parser(
        "audit",
        help=about,
        description="Check the journal of a run and its model, and say what the numbers that each site told "
        "allow over so many patients. Writes audit/centre/audit.html and audit.json into the run's folder. "
        "Attacks take patients' scans: meduet-site audit.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("folder", type=Path, metavar="DIR", help="folder of a run")
    add_policy_option(audit)
    audit.set_defaults(run=_audit)


def _audit(chosen: argparse.Namespace, console: Console) -> int:
    from audit.policy import Policy, read_policy
    from audit.report import FOLDER, write_report
    from server.holdings import centre_audit

    own = Policy(required_tests=("books", "numbers"))
    policy = own if chosen.policy is None else read_policy(chosen.policy)
    evidence, audited = centre_audit(chosen.folder)
    command = " ".join(["meduet-server", *sys.argv[1:]])
    place = chosen.folder / FOLDER / "centre"
    return write_report(evidence, audited, place, policy, command, lambda text: say(console, text))
