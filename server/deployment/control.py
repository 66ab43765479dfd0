"""Flower's control API: who may take part, which runs there are, start one, stop one.

Spoken through Flower's own command, whose JSON is its stable surface. Whoever reaches this API can start code
at every site, which is why it answers on a socket of the centre's own account only
(`federation/programs/local_socket.py`).

Does not do: decide when to start (`server/deployment/submission.py`).
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.programs.flower_programs import program
from federation.programs.health import NotServing, check_health
from server.consortium.registrations import site_keys
from server.deployment.config import ServerConfig
from server.deployment.superlink import address, flower_environment, home
from storage.files import write_whole

_CONNECTION = "centre"
_NODES = "nodes.json"
_TIMEOUT_S = 120.0


class ControlFailed(RuntimeError):
    """SuperLink did not do it, or was not there; the text is Flower's, in one line."""


@dataclass(frozen=True)
class FlowerRun:
    """One run as SuperLink tells it."""

    identity: str
    status: str
    """`pending`, `starting`, `running`, or `finished:` with `completed`, `failed` or `stopped`."""

    @property
    def finished(self) -> bool:
        """Whether it is over, one way or another."""
        return self.status.startswith("finished")


class Control:
    """The control API of the SuperLink that `config` describes."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._environment = {**os.environ, **flower_environment(config)}
        quoted = json.dumps(str(config.ca))  # a TOML basic string is a JSON string
        write_whole(
            home(config) / "config.toml",
            f'[superlink]\ndefault = "{_CONNECTION}"\n[superlink.{_CONNECTION}]\n'
            f'address = "{address(config)}"\nroot-certificates = {quoted}\n',
        )

    @property
    def consortium(self) -> Path:
        """The folder whose sites may take part; it says whose key a node has."""
        return self._config.consortium

    def runs(self) -> list[FlowerRun]:
        """Every run that SuperLink remembers."""
        reply = self._flwr("list", _CONNECTION)
        return [FlowerRun(str(run["run-id"]), str(run["status"])) for run in reply["runs"]]

    def register_sites(self) -> dict[str, str]:
        """Make the sites that may take part those of the consortium's folder; node id by site.

        A site whose key is another is registered anew, one that was revoked or is gone is shut out.
        """
        path = self._config.state_dir / _NODES
        known: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        listed = {str(node["node-id"]): str(node["status"]) for node in self._nodes()}
        known = {n: e for n, e in known.items() if listed.get(e["node"], "unregistered") != "unregistered"}
        files = site_keys(self._config.consortium)
        keys = {name: file.read_text(encoding="utf-8").strip() for name, file in files.items()}
        for name in [name for name, entry in known.items() if keys.get(name) != entry["key"]]:
            known.pop(name)
        ours = {entry["node"] for entry in known.values()}
        for node, status in listed.items():  # also what nobody remembers: a key is registered once only
            if node not in ours and status != "unregistered":
                self._flwr("supernode", "unregister", node, _CONNECTION)
        for name, key in keys.items():
            if name not in known:
                reply = self._flwr("supernode", "register", str(files[name]), _CONNECTION, "--name", name)
                known[name] = {"node": str(reply["node-id"]), "key": key}
        write_whole(path, json.dumps(known, indent=1) + "\n")
        return {name: entry["node"] for name, entry in known.items()}

    def start(self, app: Path, run_config: Mapping[str, str]) -> str:
        """Submit the application in folder `app`; the run's identity."""
        settings = " ".join(f"{name}={json.dumps(value)}" for name, value in run_config.items())
        reply = self._flwr("run", str(app), _CONNECTION, "--run-config", settings)
        return str(reply["run-id"])

    def stop(self, run: str) -> None:
        """Stop a run; sites finish what they compute, and nobody reads it."""
        self._flwr("stop", run, _CONNECTION)

    def log(self, run: str) -> str:
        """What the server application said so far."""
        return self._call("log", run, _CONNECTION, "--show").stdout

    def _nodes(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = self._flwr("supernode", "list", _CONNECTION, "--verbose")["nodes"]
        return nodes

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        done = self._call(*arguments, "--format", "json")
        what = f"`flwr {' '.join(arguments[:2])}`"
        try:
            reply: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            words = " ".join((done.stderr or done.stdout).split())[:400]
            raise ControlFailed(f"Expected {what} to answer; got {words or 'nothing'}.") from None
        if not reply.get("success"):
            words = " ".join(str(reply.get("error-message", reply)).split())[:400]
            raise ControlFailed(f"Expected {what} to succeed; {words}")
        return reply

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            check_health(f"127.0.0.1:{self._config.health_port}", timeout_s=2.0)
        except NotServing:
            raise ControlFailed("Expected SuperLink to be up; it is not (yet).") from None
        try:
            return subprocess.run(
                [*program("flwr"), *arguments],
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise ControlFailed(
                f"Expected `flwr {arguments[0]}` to answer within {_TIMEOUT_S:g} s; it did not."
            ) from None
