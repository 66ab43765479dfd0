"""Which code runs: one hash over every module that the Flower bundle ships.

A hospital approves a plan together with this hash, and a site compares it with that of the code it is
running. It finds another version, a local change, a file too many. It is no proof against code that was
made to lie: such code would skip the comparison. Against that, a site runs only a bundle whose files it has
seen.
"""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Where the running code lies: a checkout, an installation, or an unpacked bundle."""
SHIPPED = (
    ("forms", "*.py"),
    ("meduet_models", "*.py"),
    ("privacy", "*.py"),
    ("federation", "*.py"),
    ("strategies", "*.py"),
    ("client", "*.py"),
    ("server", "*.py"),
    ("conf", "*.yaml"),
)
"""What `tool.flwr.app.fab-include` in pyproject.toml names; a test compares the two."""


def shipped_modules(root: Path = ROOT) -> list[str]:
    """Files of the bundle, as sorted paths relative to `root`."""
    found = [path for folder, pattern in SHIPPED for path in (root / folder).rglob(pattern)]
    return sorted(path.relative_to(root).as_posix() for path in found if path.is_file())


def bundle_hash(root: Path = ROOT) -> str:
    """Hash of names and contents of the files of the bundle under `root`, 64 hex digits."""
    digest = hashlib.sha256()
    for name in shipped_modules(root):
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


@cache
def running_bundle() -> str:
    """Hash of the code of this process, as it lay when first asked."""
    return bundle_hash()
