"""The centre as a service: SuperLink, SuperExec and the proxy under one supervisor, until it is told to stop.

Whenever SuperLink has come up, or a certificate, a site or the list of revoked ones has changed on disk, the
sites that may take part are registered and others shut out, and the proxy reads its files again. SuperLink
reads the server's own certificate when it starts only: when another lies there, SuperLink is ended and
started again, at most once a minute, and a run under way outlives the seconds without it. Nobody has to
restart anything.

Does not do: start a run (`server/deployment/submission.py`).
"""

import signal
import time
from pathlib import Path

from federation.keys.certificates import read_certificate, read_key
from federation.programs.processes import Say, Supervisor
from server.deployment.config import ServerConfig
from server.deployment.control import Control, ControlFailed
from server.deployment.proxy import PROXY, proxy_process, watched_files
from server.deployment.superlink import SUPERLINK, superlink_processes

_LOOK_S = 1.0
RESTARTS_APART_S = 60.0
"""Least time between two restarts of SuperLink for another certificate: two in a row could cost a run."""
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
        self._served = _pair(config)
        self._complained: tuple[bytes, bytes] | None = None
        self._next_restart = 0.0

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
        self._renew()
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

    def _renew(self) -> None:
        """Start SuperLink again when the server's certificate and key have become others that belong
        together."""
        pair = _pair(self._config)
        if pair == self._served or time.monotonic() < self._next_restart:
            return
        try:
            certificate = read_certificate(pair[0])
            fit = certificate.public_key() == read_key(pair[1]).public_key()
        except ValueError:
            fit = False
        if not fit:  # one of the two is written already, or somebody copied only one
            if pair != self._complained:
                self._say(
                    "server.pem and server.key do not belong together; SuperLink keeps the earlier ones"
                )
            self._complained = pair
            return
        self._served, self._next_restart = pair, time.monotonic() + RESTARTS_APART_S
        self._say(f"another certificate of the server, until {certificate.not_valid_after_utc:%Y-%m-%d}")
        self._supervisor.restart(SUPERLINK)


def _pair(config: ServerConfig) -> tuple[bytes, bytes]:
    """The server's certificate and key as they lie there; empty for one that is not there."""
    own = (config.certificate, config.key)
    certificate, key = (path.read_bytes() if path.is_file() else b"" for path in own)
    return certificate, key


def _times(paths: "list[Path] | tuple[Path, ...]") -> Times:
    """When each of the files was written last; 0 for one that is not there."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in paths}
