"""`meduet-server bank`: what is in a latent bank, whether it opens, and taking a site or an item out.

What it does not do: any of the work (`server/latent_bank/`), or show a scan.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from federation.terminal import cell, say
from meduet_models.published.expiry import until
from server.latent_bank.bank import LatentBank
from server.latent_bank.listing import items, summary


def add_to(commands: Any) -> None:
    """Add `bank` and its own commands to the parser of `meduet-server`."""
    about = "look into a latent bank (patient data), check it, or take a site or an item out"
    bank = commands.add_parser("bank", help=about, description=about.capitalize() + ".")
    actions = bank.add_subparsers(title="what to do", metavar="ACTION", required=True)

    listing = actions.add_parser(
        "list",
        help="what is in the bank, from whom, and which models learned from it",
        description="Say what is in the bank, from whom, which models learned from it. No record is opened.",
    )
    listing.add_argument("--items", action="store_true", help="every item, not only the sites' counts")
    listing.set_defaults(run=_list)

    verify = actions.add_parser(
        "verify",
        help="open every record; put aside what is damaged",
        description="Open every record. A damaged one is put aside: training goes on without it, and it is "
        "taken anew when its site sends it again.",
    )
    verify.set_defaults(run=_verify)

    forget = actions.add_parser(
        "forget",
        help="take a site or an item out, for good",
        description="Overwrite all items of a site, or one item (a site's released_latents.csv says which "
        "scan is which item). They are never taken again, and every model that learned from them is marked. "
        "This cannot be undone.",
    )
    which = forget.add_mutually_exclusive_group(required=True)
    which.add_argument("--site", metavar="NAME", help="a site; nothing of it comes in again")
    which.add_argument("--item", metavar="ID", help="one item, 32 hex digits")
    forget.set_defaults(run=_forget)

    for action in (listing, verify, forget):
        action.add_argument("bank", type=Path, help="folder of the bank")
        action.add_argument("--key", type=Path, metavar="FILE", help="its key; default: <folder>.key")
        action.add_argument("--json", action="store_true", help="as JSON, for other programs")


def _list(chosen: argparse.Namespace, console: Console) -> None:
    latent_bank = LatentBank(chosen.bank, chosen.key, create=False)
    contents = summary(latent_bank)
    if chosen.json:
        _json(console, contents | ({"listed": list(items(latent_bank))} if chosen.items else {}))
        return
    kind = (
        "PATIENT DATA: scans can be reconstructed from it" if contents["patient_data"] else "no raw latents"
    )
    say(console, f"{contents['folder']}: {contents['items']} items. {kind}.")
    states = ("kept", "duplicate", "quarantined", "withdrawn")
    sites = Table("site", *states, "policy", "rounds")
    for site, counts in contents["sites"].items():
        name = f"{site} (withdrew)" if counts["site_withdrew"] else site
        rounds = _span(counts["rounds"])
        sites.add_row(cell(name), *(str(counts[s]) for s in states), ", ".join(counts["policies"]), rounds)
    console.print(sites)
    for plan, terms in contents["terms"].items():
        epsilon = "infinite" if (one := terms.get("epsilon")) is None else f"{one:.3f}"
        told = (
            f"Plan {plan[:12]}…: epsilon of a patient {epsilon}; to be used until: {until(terms['expires'])}."
        )
        say(console, told)
    if contents["models"]:
        console.print(_models(contents["models"]))
    if chosen.items:
        columns = ("item", "site", "round", "state", "sha256")
        listed = Table(*columns)
        for item in items(latent_bank):
            listed.add_row(*(cell(item[name]) for name in columns))
        console.print(listed)


def _verify(chosen: argparse.Namespace, console: Console) -> None:
    latent_bank = LatentBank(chosen.bank, chosen.key, create=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=chosen.json) as progress:
        task = progress.add_task("opening records", total=len(latent_bank))
        sound, damaged = latent_bank.verify(lambda done, total: progress.update(task, completed=done))
    if chosen.json:
        _json(console, {"sound": sound, "quarantined_now": damaged})
        return
    say(console, f"{sound} records open; {damaged} do not and were put aside.")


def _forget(chosen: argparse.Namespace, console: Console) -> None:
    latent_bank = LatentBank(chosen.bank, chosen.key, create=False)
    withdrawal = latent_bank.forget(site=chosen.site, item=chosen.item)
    if chosen.json:
        _json(console, dataclasses.asdict(withdrawal))
        return
    say(console, f"{withdrawal.items} items were overwritten and are not taken again.")
    say(console, *(f"{model} had learned from them: train it again without." for model in withdrawal.models))


def _models(models: list[dict[str, Any]]) -> Table:
    table = Table("model", "rounds up to", "items", "withdrawn since", "sha256")
    for model in models:
        values = (
            model["path"],
            model["last_round"],
            model["items"],
            model["withdrawn"],
            model["sha256"][:12],
        )
        table.add_row(*map(cell, values), style="red" if model["withdrawn"] else "")
    return table


def _span(rounds: list[int]) -> str:
    return str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"


def _json(console: Console, value: Mapping[str, Any]) -> None:
    console.print_json(json.dumps(value))
