"""The proxy: what the network reaches of the centre, and with whose certificate.

nginx with mutual TLS in front of SuperLink: the fleet routes and the health service for machines with a
certificate of the consortium's authority that was not revoked; nothing else. Flower itself asks for no client
certificate, and its control routes start code at every site for whoever reaches them, so this is not
optional.

Does not do: authenticate a site (SuperLink does, by the site's key), or read what passes.
"""

import os
import shutil
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from federation.programs.processes import ChildProcess
from server.deployment.app_folder import ROOT
from server.deployment.config import ServerConfig
from storage.files import write_whole

PROXY = "nginx"
TEMPLATE = "nginx.conf.j2"
_SYSTEM_FOLDERS = "/usr/sbin:/usr/local/sbin"


def proxy_configuration(config: ServerConfig) -> str:
    """The text of nginx.conf for this centre."""
    text = (ROOT / "conf" / TEMPLATE).read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    return template.render(
        folder=config.state_dir,
        port=config.port,
        health_port=config.health_port,
        public_host=config.public_host,
        public_port=config.public_port,
        certificate=config.certificate,
        key=config.key,
        ca=config.ca,
        revoked=config.revoked,
    )


def nginx() -> str:
    """The path of nginx; `ValueError` when it is not installed."""
    found = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), _SYSTEM_FOLDERS]))
    if found is None:
        raise ValueError(
            "Expected nginx on this machine; install it (apt-get install nginx), or set proxy: none in "
            "server.yaml and put another proxy in front."
        )
    return found


def nginx_is_there() -> bool:
    """Whether nginx is installed here."""
    try:
        nginx()
    except ValueError:
        return False
    return True


def proxy_process(config: ServerConfig) -> ChildProcess:
    """nginx for this centre, its configuration written to the state folder. Raises `ValueError`."""
    path = config.state_dir / "nginx.conf"
    write_whole(path, proxy_configuration(config))
    command = (nginx(), "-c", str(path), "-p", str(config.state_dir), "-e", "stderr")
    return ChildProcess(name=PROXY, command=command)


def watched_files(config: ServerConfig) -> tuple[Path, ...]:
    """Files that nginx reads when it starts, and must read again when they change."""
    return config.ca, config.certificate, config.key, config.revoked
