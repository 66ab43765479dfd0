"""`meduet-site audit`: attack what left this hospital, on its own patients; nothing leaves.

What it does not do: any of the work; see `client/audit.py` and `audit/`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from audit.options import STATUS, add_audit_options
from federation.terminal import say


def add_to(commands: Any) -> None:
    """Add `audit` to the parser of `meduet-site`."""
    about = "attack what left this site, on its own patients; nothing leaves"
    audit = commands.add_parser(
        "audit",
        help=about,
        description="Attack what left this site under a plan, as whoever reads it could: style sums, "
        "released latents, and the published model where it is given. Writes audit/PLAN/audit.html and "
        "audit.json into state_dir; they stay there, as everything else does.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")
    audit.add_argument("--plan", type=Path, required=True, metavar="FILE", help="plan.json from the centre")
    audit.add_argument(
        "--model", type=Path, metavar="FILE", help="the published model.safetensors of the plan"
    )
    add_audit_options(audit)
    audit.set_defaults(run=_audit)


def _audit(chosen: argparse.Namespace, console: Console) -> int:
    from audit.report import FOLDER, asked_effort, asked_policy, write_audit
    from client.audit import evidence_of_site
    from client.settings import load_site_config
    from client.site import Site, load_plan
    from meduet_models.threads import fixed_threads

    policy, effort = asked_policy(chosen), asked_effort(chosen)
    config, plan = load_site_config(chosen.config), load_plan(chosen.plan)
    site = Site(config)
    with fixed_threads(1):
        evidence = evidence_of_site(site, site.prepared(plan), plan, chosen.model)
        folder = site.state_dir / FOLDER / plan.sha256[:12]
        command = " ".join(["meduet-site", *sys.argv[1:]])
        return write_audit(evidence, folder, policy, effort, command, lambda text: say(console, text))
