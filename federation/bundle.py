"""Which code runs: one hash over every module that the Flower bundle ships.

A hospital approves a plan together with this hash. It finds another version, a local change, a file too many.
By itself it proves nothing against code that was made to lie: code that runs can say of itself what it likes.
So a site reckons it twice: over a bundle that arrives, in code that is installed there and before anything of
the bundle is unpacked (`client/connection/arriving_bundle.py`); and over the code that answers, which finds a
checkout that was changed since a plan was approved (`client/site.py`).

Does not do: cover pyproject.toml, the tokenizer or any other package; whoever installs them answers for them.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Where the running code lies: a checkout, an installation, or an unpacked bundle."""
SHIPPED = (
    ("storage", "*.py"),
    ("scans", "*.py"),
    ("forms", "*.py"),
    ("meduet_models", "*.py"),
    ("privacy", "*.py"),
    ("federation", "*.py"),
    ("strategies", "*.py"),
    ("audit", "*.py"),
    ("client", "*.py"),
    ("server", "*.py"),
    ("conf", "*.yaml"),
)
"""What `tool.flwr.app.fab-include` in pyproject.toml names; a test compares the two."""


def shipped_modules(root: Path = ROOT) -> list[str]:
    """Files of the bundle, as sorted paths relative to `root`."""
    found = [path for folder, pattern in SHIPPED for path in (root / folder).rglob(pattern)]
    return sorted(path.relative_to(root).as_posix() for path in found if path.is_file())


def shipped_files(root: Path = ROOT) -> dict[str, bytes]:
    """Content of each of these files, by path relative to `root`."""
    return {name: (root / name).read_bytes() for name in shipped_modules(root)}


def hash_of(files: Mapping[str, bytes]) -> str:
    """Hash of names and contents, whatever their order, 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def bundle_hash(root: Path = ROOT) -> str:
    """Hash of names and contents of the files of the bundle under `root`, 64 hex digits."""
    return hash_of(shipped_files(root))


@cache
def running_bundle() -> str:
    """Hash of the code of this process, as it lay when first asked."""
    return bundle_hash()
