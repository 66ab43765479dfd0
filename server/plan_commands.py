"""`meduet-server submit`: publish a plan for the sites to approve.

What it does not do: any of the work; see `plans.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console


def add_to(commands: Any) -> None:
    """Add `submit` to the parser of `meduet-server`."""
    about = "publish a plan as a file that every site looks at and approves"
    submit = commands.add_parser(
        "submit",
        help=about,
        description=f"{about.capitalize()}. It names the plan's hash and that of the code; sites that "
        "approved both, and no others, take part.",
    )
    submit.add_argument("plan", type=Path, metavar="PLAN.json", help="a run's plan.json")
    submit.add_argument(
        "--finetuning", type=Path, metavar="FILE", help="publish this fine-tuning of the run instead"
    )
    submit.add_argument(
        "--out", type=Path, default=Path("plans"), metavar="DIR", help="folder to write to (default: ./plans)"
    )
    submit.set_defaults(run=_submit)


def _submit(chosen: argparse.Namespace, console: Console) -> None:
    from server.plans import publish

    path, published = publish(chosen.plan, chosen.out, chosen.finetuning)
    lines = [
        f"{path}",
        f"plan {published.sha256}",
        f"code {published.bundle_sha256}",
        f"Send the file to {', '.join(published.plan.sites)}; it holds no secret. There:",
        f"  meduet-site plan show {path.name} --config site.yaml",
        f"  meduet-site plan approve {published.sha256[:12]} --config site.yaml",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
