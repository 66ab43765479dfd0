"""What every audit can be told on a command line; light enough to be imported for --help."""

import argparse
from pathlib import Path

STATUS = """\
exit status: 0 within the policy; 1 not, or what is audited cannot be read; 2 undecided, or wrong usage;
             130 interrupted
"""


def add_policy_option(parser: argparse.ArgumentParser) -> None:
    """What is allowed."""
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="what is allowed, as YAML (docs/audit.md)"
    )


def add_audit_options(parser: argparse.ArgumentParser) -> None:
    """Effort, policy, nobody's membership."""
    parser.add_argument("--quick", action="store_true", help="fewer draws, the newest release of each kind")
    add_policy_option(parser)
    parser.add_argument(
        "--null", type=int, metavar="N", help="draws of nobody's membership (1000; quick: 100)"
    )
