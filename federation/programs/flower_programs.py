"""Flower's programs: how they are called, and the environment in which both sides run them.

Telemetry, the update check, the installation of dependencies at run time and Flower's older servers without
accounts are off, everywhere. Each side has a FLWR_HOME of its own, and a socket that only its own account can
open (`federation/programs/local_socket.py`).

Does not do: start anything (`processes.py`).
Source: flwr 1.41, environment variables read at import.
"""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from federation.programs.processes import ChildProcess
from storage.files import private_folder, write_once

SUPEREXEC = "superexec"
SOCKET = "MEDUET_FLOWER_SOCKET"
"""Environment variable with the path of the socket; `federation/programs/local_socket.py`, which imports
nothing of ours, reads it."""
EXIT_MEANINGS = {
    200: "the server application failed; see the run's status",
    401: "the centre does not accept this site's signature: is its clock right (5 s ahead or 5 minutes "
    "behind is too much), its key registered?",
    305: "the centre refuses this site: not registered, revoked, wrong certificates, or still seen as online "
    "(up to 66 s after a crash)",
}
"""Flower's exit codes that an operator meets, in words; https://flower.ai/docs, exit codes."""
EXIT_PATTERN = r"Exit Code: (\d+)"
"""How Flower's programs tell their exit code: in words; the status that the system sees is 1 for all."""


def program(name: str) -> tuple[str, ...]:
    """The command of one of Flower's programs (`PROGRAMS` in `federation/programs/local_socket.py`)."""
    return (sys.executable, "-P", str(Path(__file__).with_name("local_socket.py")), name)


def environment(home: Path, socket: Path) -> dict[str, str]:
    """Variables for every program of Flower's, with `home` as its FLWR_HOME; `socket` is where its server
    answers on this machine."""
    private_folder(home.parent)
    private_folder(home)  # applications are unpacked there: nobody else may put code beside or in place
    return {
        "FLWR_HOME": str(home),
        SOCKET: str(socket),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_INTERNAL_GRPC_CONTROL_API": "0",  # both listen on every interface and ask for no account
        "FLWR_INTERNAL_GRPC_FLEET_API": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def superexec_process(secret: str, variables: Mapping[str, str], runtime_api: Sequence[str]) -> ChildProcess:
    """SuperExec of either side; `runtime_api` says where that is and how it is trusted."""
    return ChildProcess(
        name=SUPEREXEC,
        command=(
            *program("superexec"),
            "--runtime-api-address",
            *runtime_api,
            *("--superexec-auth-secret-file", secret),
        ),
        environment=variables,
        meanings=EXIT_MEANINGS,
        exit_pattern=EXIT_PATTERN,
    )


def secret_file(path: Path) -> Path:
    """A file with a secret that the parts of one side share; made once, for its owner only (mode 0600)."""
    if not path.is_file():
        private_folder(path.parent)
        write_once(path, secrets.token_bytes(32))
    return path
