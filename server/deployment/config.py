"""`server.yaml`: what the centre's own machine needs to know to run a consortium, and nothing about any run.

Read strictly, as `site.yaml` is. Certificates, keys and the sites that may take part come from the folder
that `meduet-server provision` made; the authority's private key (`ca.key`) need not be there. Everything that
Flower starts listens on loopback only; what the network reaches is the proxy (`server/deployment/proxy.py`).

Does not do: start anything (`server/deployment/superlink.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from federation.keys.kits import AUTHORITY
from federation.plan import build
from server.consortium.registrations import REVOKED

_PATHS = ("state_dir", "consortium")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What is in `server.yaml`. Relative paths there start at the file's own folder."""

    state_dir: Path
    """Folder for what runs here: logs, Flower's state and database."""
    consortium: Path
    """Folder that `meduet-server provision` made: `server/`, `sites/` and `crl.pem` are read."""
    port: int = 8443
    """Port of Flower's SuperLink, on loopback."""
    health_port: int = 8444
    """Port of its gRPC health service, on loopback, without TLS; sites reach it through the proxy."""
    proxy: Literal["nginx", "none"] = "nginx"
    """`nginx`: started and supervised here, with mutual TLS, fleet routes only. `none`: somebody else's proxy
    does that (`meduet-server proxy` prints what it has to do); without one, no site on another machine gets
    in."""
    public_host: str = "0.0.0.0"
    """Address on which the proxy listens."""
    public_port: int = 443
    """Port on which the proxy listens, as consortium.yaml tells the sites."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        ports = [self.port, self.health_port, self.public_port]
        if len(set(ports)) < len(ports) or not all(0 < port < 65536 for port in ports):
            raise ValueError(f"Expected different ports from 1 to 65535; got {', '.join(map(str, ports))}.")

    @property
    def ca(self) -> Path:
        """Certificate of the consortium's authority, PEM."""
        return self.consortium / "server" / AUTHORITY

    @property
    def certificate(self) -> Path:
        """The server's certificate, PEM; it holds for loopback, too."""
        return self.consortium / "server" / "server.pem"

    @property
    def key(self) -> Path:
        """Its private key, PEM."""
        return self.consortium / "server" / "server.key"

    @property
    def revoked(self) -> Path:
        """The authority's list of revoked certificates, PEM."""
        return self.consortium / REVOKED


def load_server_config(path: Path) -> ServerConfig:
    """Read `server.yaml`, strictly.

    Raises `ValueError` naming the file, and the setting that is unknown, missing or ill-typed, or what is not
    in the consortium's folder.
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
    try:
        config = build(ServerConfig, values, "server")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for file in (config.ca, config.certificate, config.key, config.revoked):
        if not file.is_file():
            raise ValueError(
                f"{path}: expected {file.relative_to(config.consortium)} in {config.consortium}; nothing is "
                "there. `meduet-server provision` makes it."
            )
    return config
