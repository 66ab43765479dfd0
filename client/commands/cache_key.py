"""`meduet-site cache-key`: another key for an encrypted cache, or something else that opens it.

What it does not do: any of the work (`client/latents/cache_keys.py`), or keep a passphrase.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from federation.terminal import DONE, say, typed

if TYPE_CHECKING:
    from client.settings import SiteConfig


def add_to(commands: Any) -> None:
    """Add `cache-key` and its own commands to the parser of `meduet-site`."""
    about = "the key of an encrypted cache (site.yaml: encrypt_cache): seal all anew, or change what opens it"
    cache_key = commands.add_parser("cache-key", help=about, description=about.capitalize() + ".")
    actions = cache_key.add_subparsers(title="what to do", metavar="ACTION", required=True)
    about = "seal every file of the cache under a new key"
    rotate = actions.add_parser(
        "rotate",
        help=about,
        description=f"{about.capitalize()}, and forget the old one. Stop the service first. Killed at any "
        "point, the same command goes on.",
    )
    rotate.set_defaults(run=_rotate)
    about = "change the passphrase or the key file that opens the cache's key"
    rewrap = actions.add_parser(
        "rewrap",
        help=about,
        description=f"{about.capitalize()}; no file is sealed anew. Then say the same in site.yaml.",
    )
    rewrap.add_argument(
        "--key-file", type=Path, metavar="FILE",
        help="this file shall open it, made when there is none (default: a new passphrase, asked for twice)",
    )  # fmt: skip
    rewrap.set_defaults(run=_rewrap)
    for action in (rotate, rewrap):
        action.add_argument("--config", type=Path, required=True, metavar="FILE", help="the site's site.yaml")


def ask_passphrase(config: "SiteConfig", console: Console) -> None:
    """Ask for the passphrase of the site's cache where one opens it and none is set, for this process and
    what it starts."""
    from client.latents.cache_keys import PASSPHRASE

    if config.encrypt_cache and config.cache_key_file is None and not os.environ.get(PASSPHRASE):
        os.environ[PASSPHRASE] = typed(console, "The passphrase of the encrypted cache: ")


def _rotate(chosen: argparse.Namespace, console: Console) -> int:
    from client.latents.cache_keys import opener, rotate

    config = _config(chosen, console)
    count = rotate(config.cache_folder, opener(config.cache_key_file))
    say(console, f"{count} files were sealed under a new key; the old one is forgotten.")
    return DONE


def _rewrap(chosen: argparse.Namespace, console: Console) -> int:
    from client.latents.cache_keys import Opener, opener, rewrap

    config = _config(chosen, console)
    new = Opener(chosen.key_file)
    if chosen.key_file is None:
        new = Opener(None, typed(console, "The new passphrase: "))
        if typed(console, "The same once more: ") != new.passphrase:
            raise ValueError("Expected the same passphrase twice; got two. Nothing was changed.")
    rewrap(config.cache_folder, opener(config.cache_key_file), new)
    setting = f"cache_key_file: {chosen.key_file}" if chosen.key_file else "no cache_key_file"
    say(console, f"From now on a {new.kind} opens the cache. In site.yaml: {setting}.")
    return DONE


def _config(chosen: argparse.Namespace, console: Console) -> "SiteConfig":
    from client.settings import load_site_config

    config = load_site_config(chosen.config)
    if not config.encrypt_cache:
        raise ValueError("Expected a site whose cache is encrypted (site.yaml: encrypt_cache: true).")
    ask_passphrase(config, console)
    return config
