"""Flower's programs: where they are, and the environment in which both sides run them.

Telemetry, the update check and the installation of dependencies at run time are off, everywhere. Each side
has a FLWR_HOME of its own. Programs are those of this Python environment, never whatever PATH holds.

Does not do: start anything (`processes.py`).
Source: flwr 1.41, environment variables read at import.
"""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from federation.processes import ChildProcess

SUPEREXEC = "superexec"
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


def program(name: str) -> str:
    """The path of one of Flower's programs beside this Python; `ValueError` when it is not installed."""
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        raise ValueError(f"Expected {name} beside {sys.executable}; install flwr into this environment.")
    return str(path)


def environment(home: Path) -> dict[str, str]:
    """Variables for every program of Flower's, with `home` as its FLWR_HOME."""
    home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # `mode` is not for the parents of a folder
    home.mkdir(exist_ok=True, mode=0o700)
    home.chmod(0o700)  # applications are unpacked there: nobody else may put code beside or in place of them
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def superexec_process(secret: str, variables: Mapping[str, str], runtime_api: Sequence[str]) -> ChildProcess:
    """SuperExec of either side; `runtime_api` says where that is and how it is trusted."""
    return ChildProcess(
        name=SUPEREXEC,
        command=(
            program("flower-superexec"),
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
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
    return path
