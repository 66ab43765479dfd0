"""Flower's programs on one machine, speaking through a socket that only their own account can open.

Flower 1.41 has routes on loopback that start code at every site (control) and hand out a hospital's questions
(runtime), and no authentication of accounts in the build that is free: every account of the machine could use
them, could read the token of a task in the process list, or could take the port while nobody listens there
and hand SuperExec code of its own. Here they answer on a Unix socket of mode 0600 in a folder of 0700, so
that the kernel decides who may speak; TLS and Flower's own secrets hold inside it as before. What sites need
(`/v1/fleet/`) is all that is left on SuperLink's port; a SuperNode has no port at all.

Run as a program: `python -P local_socket.py PROGRAM ...`, one of `PROGRAMS` with Flower's own arguments, and
the path of the socket in the environment. It imports nothing of ours: the code that a run brings must find
no module loaded before it. A task gets its token in a file without a name, never on the command line.

Does not do: keep out root, or another program of the same account.
Source: flwr 1.41, `superlink/cli/flower_superlink.py`, `supernode/cli/flower_supernode.py`,
`supercore/protobuf/client.py`, `supercore/superexec`; private parts, pinned with Flower.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from flwr.supercore.constant import TaskType
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec

SOCKET = "MEDUET_FLOWER_SOCKET"
"""Environment variable with the socket's path; its folder is the account's own."""
FLEET = "/v1/fleet/"
"""What SuperLink's port still answers, for the proxy."""
_TASKS = {TaskType.CLIENT_APP: "clientapp", TaskType.SERVER_APP: "serverapp"}
_FORBIDDEN = b"This route answers on the centre's own socket only."
_LONGEST_PATH = 100  # of a socket; the kernel's limit is 107 bytes

Scope = Mapping[str, Any]


def listening_socket() -> socket.socket:
    """A socket at the path in the environment that this account alone can open, listened on.

    Raises `ValueError` when the folder is another account's or open to others.
    """
    path = Path(os.environ[SOCKET])
    state = path.parent.stat()
    if state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise ValueError(f"Expected {path.parent} to be this account's alone; chmod 700 {path.parent}")
    path.unlink(missing_ok=True)  # of a program that was killed; the supervisor's lock says that it is gone
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listening.bind(_address(path))
    finally:
        os.umask(before)
    listening.listen(2048)
    return listening


def serve_on_socket_only() -> None:
    """Let every uvicorn server of this process, SuperNode's, listen on the socket and on no port."""

    def run(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        _flower_run(server, [listening_socket()])

    _flower_run = uvicorn.Server.run
    uvicorn.Server.run = run  # type: ignore[method-assign,assignment]


class FleetOnly:
    """An ASGI application of which its port answers `/v1/fleet/`, and its socket everything."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Answer, or refuse with 403."""
        if scope["type"] == "lifespan" or _is_inside(scope) or _is_fleet(scope):
            await self._application(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _FORBIDDEN})
        else:
            await send({"type": "websocket.close", "code": 1008})


def _is_inside(scope: Scope) -> bool:
    """Whether a connection came by the socket: it has a path and no port."""
    server = scope.get("server")
    return server is not None and server[1] is None


def _is_fleet(scope: Scope) -> bool:
    return bool(scope["type"] == "http" and scope["path"].startswith(FLEET))


def _serve_superlink(app: Callable[..., Any], **settings: Any) -> None:
    """In place of `uvicorn.run`: SuperLink on its port for the fleet, on the socket for the rest."""
    config = uvicorn.Config(FleetOnly(app), **settings)
    server = uvicorn.Server(config)
    server.run(sockets=[listening_socket(), config.bind_socket()])
    if not server.started:
        sys.exit(1)


def connect_by_socket() -> None:
    """Let every client of this process that speaks Flower's protocol go through the socket."""

    def begin(client: ProtobufClient, base_url: str, *, verify: Any = True, **settings: Any) -> None:
        _flower_begin(client, base_url, verify=verify, **settings)
        replaced, path = client._client, _address(Path(os.environ[SOCKET]))
        client._client = httpx.Client(
            transport=httpx.HTTPTransport(verify=verify, uds=path),
            timeout=replaced.timeout,
            follow_redirects=True,
        )
        replaced.close()

    _flower_begin = ProtobufClient.__init__
    ProtobufClient.__init__ = begin  # type: ignore[method-assign,assignment]


class OwnTasks(SubprocessExecutor):
    """Starts the two kinds of task that there are here, each through this file, with its token in a file
    that has no name."""

    def get_eligible_capacity(self, supported_task_types: set[TaskType], **_: Any) -> Any:
        """Of what Flower could start, the two kinds; the others stay with SuperLink."""
        return supported_task_types & set(_TASKS), set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a process for one task."""
        token = os.memfd_create("token")
        try:
            os.write(token, spec.token.encode())
            arguments = [
                *(sys.executable, "-P", __file__, _TASKS[spec.task_type]),
                *("--runtime-api-address", spec.runtime_api_address),
                *("--token-file", f"/proc/self/fd/{token}"),
            ]
            if spec.insecure:
                arguments.append("--insecure")
            elif spec.root_certificates_path is not None:
                arguments += ["--root-certificates", spec.root_certificates_path]
            if spec.parent_pid is not None:
                arguments += ["--parent-pid", str(spec.parent_pid)]
            silent = subprocess.DEVNULL if spec.suppress_output else None
            subprocess.Popen(arguments, stdout=silent, stderr=silent, pass_fds=(token,))
        finally:
            os.close(token)
        return LaunchResult.accepted()


def _superlink() -> None:
    from flwr.superlink.cli import flower_superlink

    uvicorn.run = _serve_superlink  # type: ignore[assignment]
    flower_superlink()


def _superexec() -> None:
    from flwr.supercore.cli import flower_superexec

    run_superexec.get_executor = lambda *_, **__: OwnTasks()  # type: ignore[attr-defined]
    connect_by_socket()
    flower_superexec()


def _serverapp() -> None:
    from flwr.superlink.cli import flwr_serverapp

    connect_by_socket()
    flwr_serverapp()


def _clientapp() -> None:
    from flwr.supernode.cli import flwr_clientapp

    connect_by_socket()
    flwr_clientapp()


def _flwr() -> None:
    from flwr.cli.app import app

    connect_by_socket()
    app()


PROGRAMS: Mapping[str, Callable[[], None]] = {
    "superlink": _superlink,
    "superexec": _superexec,
    "serverapp": _serverapp,
    "clientapp": _clientapp,
    "flwr": _flwr,
}
"""Flower's programs that this file is, by their names without `flower-` and `flwr-`."""


def _address(path: Path) -> str:
    """A name of the socket that is short enough for the kernel."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return str(path)
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)  # stays open: clients connect again and again
    return f"/proc/self/fd/{folder}/{path.name}"


def main() -> None:
    """Become the program that the first argument names."""
    name = sys.argv.pop(1)
    sys.argv[0] = name
    PROGRAMS[name]()


if __name__ == "__main__":
    main()
