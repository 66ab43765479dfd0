"""`server.yaml`: what the centre's own machine needs to know to run a consortium, and nothing about any run.

Read strictly, as `site.yaml` is. Everything Flower starts listens on loopback only; what the network reaches
is the proxy (`server/proxy.py`), and of that only what sites need.

Does not do: start anything (`server/superlink.py`), or hold a secret: keys are named by their files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from federation.plan import build

_PATHS = ("state_dir", "ca", "certificate", "key", "revoked")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What is in `server.yaml`. Relative paths there start at the file's own folder."""

    state_dir: Path
    """Folder for everything that runs here: logs, Flower's state and database, runs that name no folder."""
    ca: Path
    """Certificate of the consortium's authority, PEM."""
    certificate: Path
    """The server's certificate, PEM; it must hold for localhost, too."""
    key: Path
    """Its private key, PEM, mode 0600."""
    sites: dict[str, Path] = field(default_factory=dict)
    """Public key of each site, OpenSSH format, as `flwr supernode register` takes it; a site that is taken
    out here is shut out at the next start."""
    revoked: Path | None = None
    """The authority's list of revoked certificates, PEM; none: nobody was revoked."""
    port: int = 8443
    """Port of Flower's SuperLink, on loopback."""
    health_port: int = 8444
    """Port of its gRPC health service, on loopback, without TLS; sites reach it through the proxy."""
    proxy: Literal["nginx", "none"] = "nginx"
    """`nginx`: started and supervised here, with mutual TLS, fleet routes only. `none`: somebody else's proxy
    does that (docs/runbook.md has its configuration); without one, no site on another machine gets in."""
    public_host: str = "0.0.0.0"
    """Address on which nginx listens; no effect without it."""
    public_port: int = 443
    """Port on which nginx listens; no effect without it."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        ports = [self.port, self.health_port, *([self.public_port] if self.proxy == "nginx" else [])]
        if len(set(ports)) < len(ports) or not all(0 < port < 65536 for port in ports):
            raise ValueError(f"Expected different ports from 1 to 65535; got {', '.join(map(str, ports))}.")


def load_server_config(path: Path) -> ServerConfig:
    """Read `server.yaml`, strictly.

    Raises `ValueError` naming the file, and the setting that is unknown, missing or ill-typed, or the file
    that is not there.
    """
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"Expected the centre's settings at {path}; nothing is there.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected {path} to be a readable YAML file; {reason}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path} to hold settings (name: value); got {values!r}.")
    folder = path.resolve().parent
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = folder / Path(values[name]).expanduser()
    if isinstance(values.get("sites"), dict):
        values["sites"] = {
            n: folder / Path(p).expanduser() if isinstance(p, str) else p for n, p in values["sites"].items()
        }
    try:
        config = build(ServerConfig, values, "server")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    revoked = {} if config.revoked is None else {"revoked": config.revoked}
    named = {"ca": config.ca, "certificate": config.certificate, "key": config.key} | revoked | config.sites
    for setting, file in named.items():
        if not file.is_file():
            raise ValueError(f"{path}: expected {setting} to name a file; nothing is at {file}.")
    return config
