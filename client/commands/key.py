"""`meduet-site request`, `install` and `approver`: how a hospital, and who approves plans there, get keys.

What it does not do: any of the work; see `keys.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from federation.terminal import DONE, say, typed


def add_to(commands: Any) -> None:
    """Add the commands to the parser of `meduet-site`."""
    about = "make the site's key pair here and a signing request for the centre"
    request = commands.add_parser(
        "request",
        help=about,
        description=f"{about.capitalize()}. The private key never leaves this machine.",
    )
    request.add_argument("name", metavar="NAME", help="name of the site, as plans list it")
    request.set_defaults(run=_request)
    about = "install a start-up kit, or the certificate of a renewal"
    install = commands.add_parser(
        "install",
        help=about,
        description=f"{about.capitalize()}. Checksums and chain are verified before anything is written; the "
        "fingerprint that is printed is to be compared with the centre's over the telephone.",
    )
    install.add_argument("source", type=Path, metavar="KIT.zip|CERTIFICATE.pem", help="from the centre")
    install.set_defaults(run=_install)
    for command in (request, install):
        command.add_argument(
            "--into", type=Path, default=Path("meduet-site"), metavar="DIR",
            help="folder of site.yaml and keys/ (default: ./meduet-site); not in a git work tree",
        )  # fmt: skip
    about = "make the key of somebody who approves plans here; prints the line for site.yaml"
    approver = commands.add_parser(
        "approver",
        help=about,
        description=f"{about.capitalize()}. Each approver runs it herself and keeps file and passphrase.",
    )
    approver.add_argument("name", metavar="NAME", help="the approver's name, as site.yaml shall list it")
    approver.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where her private key goes, encrypted"
    )
    approver.set_defaults(run=_approver)


def _approver(chosen: argparse.Namespace, console: Console) -> int:
    from client.consent.approvers import new_approver
    from forms.names import SITE

    SITE.check(chosen.name, "an approver's name")
    passphrase = typed(console, "A passphrase for the new key: ")
    if typed(console, "The same once more: ") != passphrase:
        raise ValueError("Expected the same passphrase twice; got two. Nothing was written.")
    public = new_approver(chosen.out, passphrase)
    say(console, f"Written: {chosen.out}. In site.yaml, by who keeps it:")
    say(console, "approvals:", "  needed: 2", "  people:", f"    {chosen.name}: {public}")
    return DONE


def _request(chosen: argparse.Namespace, console: Console) -> int:
    from client.connection.keys import request_certificate

    path, fingerprint = request_certificate(chosen.name, chosen.into)
    say(console, f"Send {path} to the centre: it holds no secret. When they call, read out:")
    say(console, f"  {fingerprint}")
    say(console, f"Then install what they send: meduet-site install {chosen.name}.zip --into {chosen.into}")
    return DONE


def _install(chosen: argparse.Namespace, console: Console) -> int:
    from client.connection.keys import install
    from federation.keys.certificates import utc_now

    try:
        keys = install(chosen.source, chosen.into, utc_now())
        ends = keys.check(utc_now())
    except ValueError as error:
        raise ValueError(f"{error} Nothing was installed.") from None
    say(
        console,
        f"Installed: site {keys.connection.site} of {keys.connection.consortium}, until {ends:%Y-%m-%d}.",
    )
    say(console, "Call the centre by a number that did not come with the kit, and compare its fingerprint:")
    say(console, f"  {keys.authority_fingerprint}")
    say(console, f"If it is another, delete {keys.folder}. Then fill in {chosen.into / 'site.yaml'}.")
    return DONE
