"""`meduet-server provision`, `approve`, `renew`, `revoke`, `certificates`: the office for keys, typed.

What it does not do: any of the work; see `provisioning.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federation.keys.certificates import read_request, utc_now
from federation.keys.key_files import read_file
from federation.terminal import cell, say
from server.consortium.provisioning import SERVER, load_consortium, open_office, provision


def add_to(commands: Any) -> None:
    """Add the commands to the parser of `meduet-server`."""
    about = "make the consortium's authority, the server's certificate and a start-up kit per site"
    parser = _command(commands, "provision", about, _provision)
    parser.add_argument("consortium", type=Path, metavar="CONSORTIUM.yaml", help="names and addresses")
    about = "sign the request of a site that keeps its private key to itself"
    parser = _command(commands, "approve", about, _approve)
    parser.add_argument("request", type=Path, metavar="REQUEST.csr", help="made by `meduet-site request`")
    parser.add_argument(
        "--fingerprint", default="", metavar="HEX",
        help="of the request, as the site reads it out over the telephone; without it nothing is signed",
    )  # fmt: skip
    about = "make a later certificate under the same authority"
    parser = _command(commands, "renew", about, _renew)
    parser.add_argument("site", metavar="SITE", help=f"a site, or `{SERVER}`")
    about = "revoke every certificate of a site"
    parser = _command(commands, "revoke", about, _revoke)
    parser.add_argument("site", metavar="SITE", help="a site")
    _command(commands, "certificates", "list every certificate and when it ends", _certificates)
    parser = _command(commands, "sign", "sign a file, weights say, with the consortium's key", _sign)
    parser.add_argument("file", type=Path, metavar="FILE", help="model.safetensors of a run or an export")


def _command(commands: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about.capitalize() + "."
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("consortium"), metavar="DIR",
        help="folder of the authority (default: ./consortium); not in a git work tree",
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _provision(chosen: argparse.Namespace, console: Console) -> None:
    done = provision(load_consortium(chosen.consortium), chosen.folder)
    office = done.office
    say(console, f"{'New authority' if done.created else 'Authority'} of {office.settings.name}, fingerprint")
    say(console, f"  {office.fingerprint}")
    say(
        console,
        "Read it out to every site that calls. Back up ca.key offline; it stays on this machine only.",
    )
    for kit in done.kits:
        say(console, f"Kit of {kit.stem}: {kit} holds its private key. Hand it over, then delete it here.")
    for site in done.awaited:
        say(console, f"{site} makes its own key: ask for the file that `meduet-site request {site}` writes.")
    if not done.kits and not done.awaited:
        say(console, "Every site has its certificate; nothing was made.")


def _approve(chosen: argparse.Namespace, console: Console) -> None:
    pem = read_file(chosen.request, "a signing request")
    request = read_request(pem)
    if not chosen.fingerprint:
        raise ValueError(
            f"Site {request.site!r} asks for a certificate for the key {request.fingerprint}. Nothing was "
            "signed. Call the site by a number you know, and run this again with --fingerprint and what it "
            "reads out."
        )
    office = open_office(chosen.folder)
    kit = office.approve(pem, chosen.fingerprint, utc_now())
    say(console, f"Signed. Send {kit} to {request.site}: it holds no secret.")
    say(console, "A running `meduet-server start` lets it in by itself.")


def _renew(chosen: argparse.Namespace, console: Console) -> None:
    office = open_office(chosen.folder)
    if chosen.site == SERVER:
        path = office.renew_server(utc_now())
        say(console, f"{path} and server.key are new. Restart `meduet-server start`.")
        return
    path = office.renew_site(chosen.site, utc_now())
    say(console, f"{path} is new, for the same key. Send it to {chosen.site}: it holds no secret. There:")
    say(console, f"  meduet-site install {path.name} --into /etc/meduet")


def _revoke(chosen: argparse.Namespace, console: Console) -> None:
    office = open_office(chosen.folder)
    path = office.revoke(chosen.site, utc_now())
    say(console, f"Revoked. {path} lists it; a running `meduet-server start` shuts the site out at once.")
    say(console, "With a proxy of your own: reload that now (nginx -s reload).")


def _sign(chosen: argparse.Namespace, console: Console) -> None:
    from server.consortium.signing import sign_file

    office = open_office(chosen.folder)
    beside = sign_file(chosen.file, office.authority)
    say(console, f"{beside}: signed by {office.settings.name}, fingerprint")
    say(console, f"  {office.fingerprint}")


def _certificates(chosen: argparse.Namespace, console: Console) -> None:
    office = open_office(chosen.folder)
    now = utc_now()
    table = Table("whose", "ends", "state", "key")
    for one in office.issued():
        state = f"in {(one.not_after - now).days} days" if now < one.not_after else "ended"
        table.add_row(
            cell(one.name),
            f"{one.not_after:%Y-%m-%d}",
            "revoked" if one.revoked else state,
            one.key[:19] + " …",
        )
    console.print(table)
    say(console, f"Authority: {office.fingerprint}")
