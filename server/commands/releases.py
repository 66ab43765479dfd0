"""`meduet-server releases show | withdraw`: what sites released in a run, what was made of it, who withdrew.

What it does not do: any of the work (`server/releases.py`).
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federation.terminal import cell, say
from meduet_models.published.expiry import is_expired, until
from server.releases import Made, register, withdraw


def add_to(commands: Any) -> None:
    """Add `releases` and its own commands to the parser of `meduet-server`."""
    about = "what sites released in a run and what was made of it; note that a site withdrew"
    releases = commands.add_parser("releases", help=about, description=about.capitalize() + ".")
    actions = releases.add_subparsers(title="what to do", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="every release, and every file that was made of them",
        description="Every release as the journal names it, and every file in the run's folder that was made "
        "of them, with its hash, whose releases went into it, and who withdrew since.",
    )
    show.add_argument("--json", action="store_true", help="as JSON, for other programs")
    show.set_defaults(run=_show)
    taken = actions.add_parser(
        "withdraw",
        help="a site takes back what it released: mark every file that was made of it",
        description="Write into the run's journal that a site withdrew, and mark every file that was made of "
        "its releases: whoever loads one with FedMeDUET is told. A model does not forget; train again "
        "without the site. Latents in a bank are taken out by meduet-server bank forget.",
    )
    taken.add_argument("site", metavar="SITE", help="name of the site")
    taken.add_argument("--reason", required=True, metavar="TEXT", help="why, for the record")
    taken.set_defaults(run=_withdraw)
    for action in (show, taken):
        action.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")


def _show(chosen: argparse.Namespace, console: Console) -> None:
    found = register(chosen.folder)
    if chosen.json:
        console.print_json(json.dumps(dataclasses.asdict(found)))
        return
    table = Table("when (UTC)", "site", "what", "round", "bytes", "sha256", title="Released by sites")
    for one in found.received:
        site = f"{one.site} (withdrew)" if one.withdrawn else one.site
        values = (one.utc[:19].replace("T", " "), site, one.kind, one.round, one.bytes, one.sha256[:12])
        table.add_row(*map(cell, values))
    console.print(table)
    console.print(_files(found.made, "Made of it"))


def _withdraw(chosen: argparse.Namespace, console: Console) -> None:
    touched = withdraw(chosen.folder, chosen.site, chosen.reason)
    say(console, f"{chosen.site} withdrew; the journal of the run says so.")
    if touched:
        after = {one.file: one for one in register(chosen.folder).made}
        console.print(_files([after[one.file] for one in touched], "Made of its releases, and marked now"))
        say(console, "Copies elsewhere are not found from here: tell whoever has one.")
    else:
        say(console, "Nothing in this folder was made of its releases.")


def _files(made: list[Made] | tuple[Made, ...], title: str) -> Table:
    table = Table("file", "sha256", "made of releases of", "withdrew", "until", title=title)
    for one in made:
        values = (one.file, one.sha256[:12], ", ".join(one.sites), ", ".join(one.withdrawn) or "nobody")
        red = one.withdrawn or is_expired(one.expires)
        table.add_row(*map(cell, (*values, until(one.expires))), style="red" if red else "")
    return table
