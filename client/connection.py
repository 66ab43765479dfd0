"""How a site reaches the centre: the section `centre` of site.yaml.

Files are named, never their content. One key pair serves twice: as TLS client certificate at the centre's
proxy, and, written in another format, as Flower's node key.

Does not do: connect (`client/supernode.py`), or make keys.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SITE_CONFIG = "site-config"
"""Key of the SuperNode's `--node-config` that says where this hospital's site.yaml is."""


@dataclass(frozen=True, kw_only=True)
class CentreConnection:
    """Where the centre is, and with what this site shows who it is."""

    address: str
    """host:port of the centre's proxy; only this machine calls, never the other way round."""
    ca: Path
    """Certificate of the consortium's authority, PEM: the only one trusted."""
    certificate: Path
    """This site's certificate, PEM."""
    key: Path
    """Its private key, PEM, readable by nobody else (mode 0600)."""
    port: int = 9094
    """Port on this machine's loopback where the parts of this site talk to each other."""

    def __post_init__(self) -> None:
        """Refuse what cannot be an address or a port."""
        if not re.fullmatch(r"[A-Za-z0-9.\[\]:_-]+:\d{1,5}", self.address):
            raise ValueError(f"Expected centre.address as host:port; got {self.address!r}.")
        if not 0 < self.port < 65536:
            raise ValueError(f"Expected centre.port from 1 to 65535; got {self.port}.")


def resolve_paths(values: Any, folder: Path) -> None:
    """Let relative paths in a `centre` section start at `folder`."""
    if isinstance(values, dict):
        for name in ("ca", "certificate", "key"):
            if isinstance(values.get(name), str):
                values[name] = folder / Path(values[name]).expanduser()
