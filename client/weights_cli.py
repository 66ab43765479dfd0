"""`meduet`: what somebody types who has a run's weights and scans, and needs neither a site nor a federation.

What it does not do: know Flower, Ray, Opacus or Hydra; an installation without them runs it.
"""

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with PyTorch: a thread that waits leaves its core

from rich.console import Console

from client.commands import embedding as embedding_commands
from federation.terminal import ended, terminal
from storage.files import keep_to_owner


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run one command; returns the exit status (see `meduet embed --help`)."""
    console = console or terminal()
    keep_to_owner()
    parser = argparse.ArgumentParser(
        prog="meduet", description="What a run's weights are for: scans in, numbers out. Offline."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    embedding_commands.add_to(commands)
    chosen = parser.parse_args(arguments)
    return ended(
        lambda: chosen.run(chosen, console),
        console,
        interrupted="Interrupted. Results of single scans are kept; tables are written at the end.",
        advice="Put this right and run the same command again.",
    )


if __name__ == "__main__":
    sys.exit(main())
