"""The centre as a service: SuperLink, SuperExec and the proxy under one supervisor, until it is told to stop.

Whenever SuperLink has come up, or a certificate, a site or the list of revoked ones has changed on disk, the
sites that may take part are registered and others shut out, and the proxy reads its files again. Nobody has
to restart anything, but for a new certificate of the server itself, which SuperLink reads when it starts.

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
Times = dict[Path, int]


class Service:
    """What `meduet-server start` does between its start and its end."""

    def __init__(self, config: ServerConfig, say: Say) -> None:
        self._config, self._say = config, say
        children = superlink_processes(config)
        if config.proxy == "nginx":
            children = (*children, proxy_process(config))
        self._supervisor = Supervisor(children, config.state_dir, say)
        self._control = Control(config)
        self._registered: tuple[int, Times] | None = None
        self._proxied = _times(watched_files(config))
        self._next_look = 0.0

    def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises `AlreadySupervised`."""
        with self._supervisor:
            self._say(f"starting; logs in {self._config.state_dir}")
            self._supervisor.run(self.look)
            self._say("stopping")

    def look(self) -> None:
        """Do what a change on disk, or of SuperLink, asks for; at most once a second."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        if self._config.proxy == "nginx" and (now := _times(watched_files(self._config))) != self._proxied:
            self._proxied = now
            self._supervisor.signal_child(PROXY, signal.SIGHUP)
            self._say("certificates changed on disk; the proxy reads them again")
        pid = self._supervisor.pid(SUPERLINK)
        if pid is None:
            return
        sites = _times([*self._config.consortium.glob("sites/*/*"), self._config.revoked])
        if (pid, sites) == self._registered:
            return
        try:
            names = self._control.register_sites()
        except ControlFailed:
            return  # not yet; asked again at the next look
        self._registered = (pid, sites)
        self._say(f"up; sites that may take part: {', '.join(names) or 'none'}")


def _times(paths: "list[Path] | tuple[Path, ...]") -> Times:
    """When each of the files was written last; 0 for one that is not there."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in paths}
