"""`server.yaml`: what the centre's own machine needs to know to run a consortium, and nothing about any run.

Read strictly, as `site.yaml` is. Certificates, keys and the sites that may take part come from the folder
that `meduet-server provision` made; the authority's private key (`ca.key`) need not be there. Everything that
Flower starts listens on loopback only; what the network reaches is the proxy (`server/deployment/proxy.py`).

Does not do: start anything (`server/deployment/superlink.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from federation.keys.key_files import read_text
from federation.keys.kits import AUTHORITY
from forms.form import build, check
from forms.names import Letters
from forms.paths import resolve_paths
from forms.ranges import Range, shown
from forms.yaml_text import read_yaml
from server.consortium.registrations import REVOKED

_PATHS = ("state_dir", "consortium")
PORT = Range(at_least=1, at_most=65535)
HOST = Letters(r"[A-Za-z0-9._:\[\]-]{1,253}", "a host's name or address")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What is in `server.yaml`. Relative paths there start at the file's own folder."""

    state_dir: Path
    """Folder for what runs here: logs, Flower's state and database."""
    consortium: Path
    """Folder that `meduet-server provision` made: `server/`, `sites/` and `crl.pem` are read."""
    port: Annotated[int, PORT] = 8443
    """Port of Flower's SuperLink, on loopback."""
    health_port: Annotated[int, PORT] = 8444
    """Port of its gRPC health service, on loopback, without TLS; sites reach it through the proxy."""
    proxy: Literal["nginx", "none"] = "nginx"
    """`nginx`: started and supervised here, with mutual TLS, fleet routes only. `none`: somebody else's proxy
    does that (`meduet-server proxy` prints what it has to do); without one, no site on another machine gets
    in."""
    public_host: Annotated[str, HOST] = "0.0.0.0"
    """Address on which the proxy listens."""
    public_port: Annotated[int, PORT] = 443
    """Port on which the proxy listens, as consortium.yaml tells the sites."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        check(self, "server")
        ports = [self.port, self.health_port, self.public_port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"Expected different ports; got {', '.join(map(str, ports))}.")

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
    values: Any = read_yaml(read_text(path, "the centre's settings"), f"settings in {path}")
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path} to hold settings (name: value); got {shown(values)}.")
    folder = path.resolve().parent
    try:
        resolve_paths(values, _PATHS, folder, "server")
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
