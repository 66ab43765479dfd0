"""`meduet-site releases`: what left this hospital, to whom, under which plan, and who approved it.

What it does not do: read a scan, or know what the centre made of it (`meduet-server releases`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federation.terminal import DONE, cell
from meduet_models.published.expiry import until


def add_to(commands: Any) -> None:
    """Add `releases` to the parser of `meduet-site`."""
    about = "what left this site: what, when, to whom, under which plan and promise, who approved it"
    releases = commands.add_parser("releases", help=about, description=about.capitalize() + ".")
    releases.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")
    releases.add_argument("--json", action="store_true", help="as JSON, for other programs")
    releases.set_defaults(run=_releases)


def _releases(chosen: argparse.Namespace, console: Console) -> int:
    from client.releases import releases_of
    from client.settings import load_site_config

    found = releases_of(load_site_config(chosen.config))
    if chosen.json:
        console.print_json(json.dumps(found))
        return DONE
    table = Table(
        "when (UTC)", "what", "round", "bytes", "sha256", "to", "plan", "until", "approved by", "promise"
    )
    for one in found:
        promise = "no noise" if one["epsilon"] is None else f"epsilon {one['epsilon']:.3g}"
        when, people = one["utc"][:19].replace("T", " "), ", ".join(one["approved_by"])
        values = (when, one["kind"], one["round"], one["bytes"], one["sha256"][:12], one["to"], one["plan"])
        table.add_row(*map(cell, (*values, until(one["expires"]), people, promise)))
    console.print(table)
    return DONE
