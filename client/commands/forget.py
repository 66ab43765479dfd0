"""`meduet-site forget PATIENT`: what was derived from a patient who withdrew goes; what left is named.

What it does not do: any of the work (`client/forgetting.py`), or touch her scans.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from client.commands.cache_key import ask_passphrase
from federation.terminal import DONE, say


def add_to(commands: Any) -> None:
    """Add `forget` to the parser of `meduet-site`."""
    about = "remove what was derived from a patient who withdrew, and take her scans no more"
    forget = commands.add_parser(
        "forget",
        help=about,
        description=f"{about.capitalize()}: encodings, memos, tables, answers and states of rounds go. Her "
        "scans in the data folder stay where they are. Names what left and may hold her. Stop the service "
        "first; killed at any point, the same command goes on.",
    )
    forget.add_argument("patient", metavar="PATIENT", help="her name in cohort.csv")
    forget.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")
    forget.set_defaults(run=_forget)


def _forget(chosen: argparse.Namespace, console: Console) -> int:
    from client.forgetting import forget
    from client.settings import load_site_config, processes_of
    from client.site import Site
    from client.turns import turn
    from federation.programs.processes import read_state

    config = load_site_config(chosen.config)
    running = read_state(processes_of(config))
    if running is not None and running["pid"] is not None:
        raise ValueError("Expected the service to be stopped: what it computes now may hold her. Stop it.")
    ask_passphrase(config, console)
    with turn(config.state_dir):  # a second centre's service may run
        left = forget(Site(config), chosen.patient)
    say(console, "Forgotten here: encodings, memos, rows of tables, kept answers, states of rounds.")
    if not left.releases:
        say(console, "Nothing that left this site can hold her.")
        return DONE
    say(console, "What left before and may hold her; only who has it can take it back:")
    for row in left.releases:
        what = f"{row['kind']}, round {row['round']}, {row['sha256'][:12]}…, plan {row['plan']}"
        say(console, f"  {row['utc'][:19].replace('T', ' ')} {what}, to {row['to']}")
    for item in left.items:
        say(console, f"  tell the centre: meduet-server bank forget BANK --item {item}")
    return DONE
