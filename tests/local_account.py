"""What another account of the same machine tries: `python -P local_account.py control|runtime ...`.

It knows the ports, the socket's path and whatever the process list shows, speaks Flower's protocol, and
trusts any certificate. One line of JSON tells what it got. Nothing of FedMeDUET is imported.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

NOBODY = 65534
_LISTENS = "0A"  # in /proc/net/tcp
_PYPROJECT = b"""
[project]
name = "foreign"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "foreign"
[tool.flwr.app.components]
serverapp = "foreign.app:server"
clientapp = "foreign.app:client"
[tool.flwr.app.config]
"""


def attack(*arguments: str) -> dict[str, Any]:
    """Run this file as `nobody`; what that account got, by what it tried. Skips where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another account")
    done = subprocess.run(
        [sys.executable, "-P", __file__, *arguments],
        env={"PATH": os.defpath, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return got


def become_nobody() -> None:
    """From now on this process is another account's; all that it needs is loaded by then."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    assert not os.access("/root", os.R_OK)


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses at which these processes listen for TCP."""
    sockets: set[str] = set()
    for pid in pids:
        for held in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                sockets.add(str(held.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS and words[9] in sockets:
                stored = bytes.fromhex(
                    words[1].partition(":")[0]
                )  # 32-bit words, each in this machine's order
                there = b"".join(stored[i : i + 4][::-1] for i in range(0, len(stored), 4))
                found.add(socket.inet_ntop(family, there).removeprefix("::ffff:"))
    return found


def family(pid: int) -> list[int]:
    """A process and all that it started, however deep."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            todo += [int(child) for child in task.read_text().split()]
    return found


def tokens_in_the_process_list() -> list[str]:
    """Whatever stands behind `--token` on a command line that this account can read."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        found += [after.decode() for word, after in pairwise(words) if word == b"--token"]
    return found


def tried(call: Callable[[Any], Any], request: Any, field: str) -> str:
    """What the answer says in `field`, or why there is none."""
    try:
        answer = call(request)
        for part in field.split("."):
            answer = getattr(answer, part)
        return " ".join(map(str, answer)) if field == "run_dict" else str(answer)
    except httpx.HTTPStatusError as error:
        return f"status {error.response.status_code}"
    except (OSError, httpx.TransportError) as error:
        return f"refused: {error}"


def clients(kind: Any, server: str, path: str, interceptors: list[Any], secure: bool) -> dict[str, Any]:
    """One client through the port, one through the socket."""

    def client() -> Any:
        return kind(f"{'https' if secure else 'http'}://{server}", interceptors=interceptors, verify=False)

    by_port, by_socket = client(), client()
    by_socket._client = httpx.Client(transport=httpx.HTTPTransport(verify=False, uds=path))
    return {"port": by_port, "socket": by_socket}


def control(server: str, path: str) -> dict[str, str]:
    """Submit an application, list runs, stop one."""
    content, _ = build_fab_from_files(
        {"pyproject.toml": _PYPROJECT, "foreign/__init__.py": b"", "foreign/app.py": b"server = client = 1\n"}
    )
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    got = {}
    versions = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    for way, client in clients(ControlHttpClient, server, path, versions, secure=True).items():
        start = StartRunRequest(fab=fab, federation=NOOP_FEDERATION_ID)
        got[f"submit by {way}"] = tried(client.StartRun, start, "run_id")
        got[f"list by {way}"] = listed = tried(client.ListRuns, ListRunsRequest(), "run_dict")
        known = int(listed.split()[0]) if listed and listed.split()[0].isdigit() else 1
        got[f"stop by {way}"] = tried(client.StopRun, StopRunRequest(run_id=known), "success")
    return got


def runtime(server: str, path: str, *known: str) -> dict[str, str]:
    """Take a task's question, with the tokens of the process list and those that are `known` anyhow."""
    seen = tokens_in_the_process_list()
    got = {"tokens seen": " ".join(seen)}
    for token in [*seen, *known]:
        words = [RuntimeVersionHttpInterceptor(component_name="x"), RuntimeTokenHttpInterceptor(token)]
        for way, client in clients(RuntimeHttpClient, server, path, words, secure=False).items():
            got[f"question by {way}"] = tried(client.PullTaskInput, PullTaskInputRequest(), "run.run_id")
    return got


if __name__ == "__main__":
    become_nobody()
    sys.stdout.write(json.dumps({"control": control, "runtime": runtime}[sys.argv[1]](*sys.argv[2:])) + "\n")
