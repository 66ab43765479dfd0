"""Flower's side of the centre: SuperLink and SuperExec as children of one supervisor.

Process isolation: SuperLink keeps messages and starts nothing; SuperExec starts the server application and
shares a secret with it, so that a SuperLink that dies for seconds takes no run with it (measured: 8 s down,
the run goes on; 75 s, it fails and is submitted again, `server/deployment/submission.py`). The state is a
database file, which keeps the sites' registrations and whatever is under way over such a restart, and is no
slower than memory (docs/log.md, "What a round costs over TLS").

Does not do: let anybody in from outside: that is the proxy's (`server/deployment/proxy.py`).
Source: flwr 1.41, `flower-superlink --help`; measured outages in docs/runbook.md.
"""

from pathlib import Path

from federation.programs.flower_programs import (
    EXIT_MEANINGS,
    EXIT_PATTERN,
    environment,
    program,
    secret_file,
    superexec_process,
)
from federation.programs.processes import ChildProcess
from server.deployment.config import ServerConfig
from storage.files import private_folder

SUPERLINK = "superlink"
SOCKET = "superlink.sock"


def home(config: ServerConfig) -> Path:
    """FLWR_HOME of everything at the centre."""
    return config.state_dir / "flower"


def address(config: ServerConfig) -> str:
    """Where SuperLink answers sites, on this machine; its certificate holds for it."""
    return f"127.0.0.1:{config.port}"


def flower_environment(config: ServerConfig) -> dict[str, str]:
    """Variables of Flower's programs at the centre, among them the socket on which SuperLink answers the
    centre's own account."""
    return environment(home(config), config.state_dir / SOCKET)


def superlink_processes(config: ServerConfig) -> tuple[ChildProcess, ...]:
    """SuperLink and SuperExec, in the order in which they are started."""
    private_folder(config.state_dir)
    variables = flower_environment(config)
    secret = str(secret_file(config.state_dir / "superexec.secret"))
    superlink = ChildProcess(
        name=SUPERLINK,
        command=(
            *program("superlink"),
            *("--host", "127.0.0.1", "--port", str(config.port)),
            *("--ssl-ca-certfile", str(config.ca)),
            *("--ssl-certfile", str(config.certificate), "--ssl-keyfile", str(config.key)),
            "--enable-supernode-auth",
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
            *("--database", str(config.state_dir / "superlink.db")),
            *("--health-server-address", f"127.0.0.1:{config.health_port}"),
            "--disable-runtime-dependency-installation",
        ),
        environment=variables,
        meanings=EXIT_MEANINGS,
        exit_pattern=EXIT_PATTERN,
    )
    runtime_api = (address(config), "--root-certificates", str(config.ca))
    superexec = superexec_process(secret, variables, runtime_api)
    return superlink, superexec
