"""The centre as a service: SuperLink, SuperExec and the proxy under one supervisor, until it is told to stop.

Whenever SuperLink has come up, the sites of `server.yaml` are registered. When a certificate or the list of
revoked ones changes on disk, the proxy reads it again; nobody has to restart anything.

Does not do: start a run (`server/submission.py`).
"""

import signal
import time
from pathlib import Path

from federation.processes import Say, Supervisor
from server.control import Control, ControlFailed
from server.deployment import ServerConfig
from server.proxy import PROXY, proxy_process, watched_files
from server.superlink import SUPERLINK, superlink_processes

_LOOK_S = 1.0


class Service:
    """What `meduet-server start` does between its start and its end."""

    def __init__(self, config: ServerConfig, say: Say) -> None:
        self._config, self._say = config, say
        children = superlink_processes(config)
        if config.proxy == "nginx":
            children = (*children, proxy_process(config))
        self._supervisor = Supervisor(children, config.state_dir, say)
        self._control = Control(config)
        self._registered_at: int | None = None
        self._seen = self._times()
        self._next_look = 0.0

    def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises `AlreadySupervised`."""
        with self._supervisor:
            self._say(f"starting; logs in {self._config.state_dir}")
            self._supervisor.run(self._on_tick)
            self._say("stopping")

    def _on_tick(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        if self._config.proxy == "nginx" and (times := self._times()) != self._seen:
            self._seen = times
            self._supervisor.signal_child(PROXY, signal.SIGHUP)
            self._say("certificates changed on disk; the proxy reads them again")
        pid = self._supervisor.pid(SUPERLINK)
        if pid is None or pid == self._registered_at:
            return
        try:
            sites = self._control.register_sites()
        except ControlFailed:
            return  # not yet; asked again at the next look
        self._registered_at = pid
        self._say(f"up; sites that may take part: {', '.join(sites) or 'none'}")

    def _times(self) -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns if path.is_file() else 0 for path in watched_files(self._config)
        }
