"""`meduet-site start | watch`: the site as something that runs.

Does not do: more than read arguments and call the module that does the work; heavy ones are imported then.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from client.commands.cache_key import ask_passphrase
from federation.terminal import say
from storage.files import private_folder


def add_to(commands: Any) -> None:
    """Add these commands to `meduet-site`'s parser."""
    start = commands.add_parser(
        "start",
        help="join the federation: run Flower's SuperNode, until SIGTERM or Ctrl-C",
        description="Start and supervise what connects this site to the centre. Only this machine calls out; "
        "nothing listens on a port. What ends is started again. Refuses until a person here has "
        "confirmed who the patients are (check --confirm-patients).",
    )
    start.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")
    start.set_defaults(run=_start)
    watch = commands.add_parser(
        "watch",
        help="a page to watch this site on this machine, and its numbers for Prometheus; read-only",
        description="Serve what left this site, under which promise, what was charged and what runs, as a "
        "page on loopback, until Ctrl-C. It needs no JavaScript, asks nobody, and can change nothing. The "
        "address holds a word that only the owner of state_dir can read.",
    )
    watch.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")
    watch.add_argument("--port", type=int, default=8601, help="on loopback; 0: any (default 8601)")
    watch.set_defaults(run=_watch)


def _watch(chosen: argparse.Namespace, console: Console) -> None:
    from client.settings import load_site_config
    from client.watch import watched
    from federation.watching import watch

    config = load_site_config(chosen.config)
    private_folder(config.state_dir)
    watch(lambda: watched(config), config.state_dir, chosen.port, lambda line: say(console, line))


def _start(chosen: argparse.Namespace, console: Console) -> int:
    from client.books.books import open_books
    from client.connection.supernode import supernode_processes
    from client.consent.confirmation import CURE, unconfirmed
    from client.latents.cache_keys import cache_keys, opener
    from client.settings import load_site_config, processes_of
    from client.site_scans import survey_site
    from federation.programs.processes import become_supervisor

    config = load_site_config(chosen.config)
    private_folder(config.state_dir)
    children = supernode_processes(config, chosen.config)
    open_books(config.state_dir)
    found = survey_site(config).patients
    if problem := unconfirmed(config.state_dir, config.data_root, found):
        raise ValueError(f"Not started: {problem}. {found.guess()}. {CURE}")
    ask_passphrase(config, console)
    if config.encrypt_cache:
        cache_keys(config.cache_folder, opener(config.cache_key_file))
    become_supervisor(children, processes_of(config))
