"""`meduet-server`: what the coordinating centre types. One line of help per command, one line per error.

What it does not do: decide anything. Each command reads its arguments and calls the module that does the
work.
"""

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with PyTorch: a thread that waits leaves its core

from rich.console import Console

from federation.programs.loopback import spare_loopback
from federation.terminal import ended, terminal
from storage.files import keep_to_owner

_STATUS = (
    "exit status: 0 done, or stopped in good order; 1 a run was given up, or a file could not be read or "
    "written: a person has to look; 2 refused: "
    "wrong usage, settings, plan or folder, a record that was tampered with, or it runs already; 130 "
    "interrupted"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0: done, 1: given up, 2: refused; a line says why)."""
    console = terminal()
    spare_loopback()
    keep_to_owner()
    return ended(
        lambda: _run(arguments, console),
        terminal(stderr=True),
        interrupted="Interrupted. The same command goes on from the last checkpoint, if it made one.",
        advice="Put this right and run the same command again.",
    )


def _run(arguments: Sequence[str] | None, console: Console) -> int | None:
    from server.commands import anatomy as anatomy_commands
    from server.commands import audit as audit_commands
    from server.commands import bank as bank_commands
    from server.commands import export as export_commands
    from server.commands import journal as journal_commands
    from server.commands import plan as plan_commands
    from server.commands import provisioning as provisioning_commands
    from server.commands import releases as releases_commands
    from server.commands import service as service_commands
    from server.commands import synthesis as synthesis_commands
    from server.commands import tokenizer as tokenizer_commands

    parser = argparse.ArgumentParser(
        prog="meduet-server",
        description="The coordinating centre of a FedMeDUET federation.",
        epilog=_STATUS,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    service_commands.add_to(commands)
    tokenizer_commands.add_to(commands)
    anatomy_commands.add_to(commands)
    synthesis_commands.add_to(commands)
    bank_commands.add_to(commands)
    export_commands.add_to(commands)
    provisioning_commands.add_to(commands)
    plan_commands.add_to(commands)
    journal_commands.add_to(commands)
    releases_commands.add_to(commands)
    audit_commands.add_to(commands)
    chosen = parser.parse_args(arguments)
    status: int | None = chosen.run(chosen, console)
    return status


if __name__ == "__main__":
    sys.exit(main())
