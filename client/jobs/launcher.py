"""How this site starts a job: a command of its own, that is given one script and waits for its end.

`site.yaml: launcher: [sbatch, --wait]` and the like: whatever runs a script, here or elsewhere, and ends when
that has ended. The script starts this very code with this very Python, so both must be found under the same
paths where the job runs, and so must the site's folders.

Does not do: know any scheduler. Whether a job was done shows in the file that it leaves, not in how its
launcher ended.
"""

import dataclasses
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.consent.approvers import ApprovalRule
from client.settings import SiteConfig
from federation.bundle import ROOT
from federation.programs.processes import die_with_parent
from storage.files import write_whole

SCRIPT = "job.sh"
_SAID = ("launcher.log", "job.log")
_PROGRAM = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "  # this code's
    "from client.jobs.program import main; sys.exit(main())"
)
_LOOK_S = 0.2
_GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL for a launcher that nobody waits for any more."""
_LINES = 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launcher:
    """A site's launcher."""

    command: tuple[str, ...]
    """Program and arguments; the script is added at the end."""
    settings: str
    """What a job is told of `site.yaml`, as JSON."""

    @staticmethod
    def of(config: SiteConfig) -> "Launcher | None":
        """The launcher in a site's settings; None where its answers are worked out in their own process."""
        if not config.launcher:
            return None
        told = dataclasses.replace(
            config, keys_dir=None, launcher=(), approvals=ApprovalRule(), allowed_hours=""
        )
        values = {name: value for name, value in dataclasses.asdict(told).items() if value is not None}
        return Launcher(config.launcher, json.dumps(values, default=lambda path: str(Path(path).absolute())))

    def run(self, request: Path, look: Callable[[], None]) -> int:
        """Have the job of `request` done in its folder, and return how the launcher ended.

        `look` is called all the while; what it raises ends the launcher, and is raised.
        """
        folder = request.parent
        script, log = folder / SCRIPT, shlex.quote(str(folder / _SAID[1]))
        program = shlex.join((sys.executable, "-P", "-c", _PROGRAM, str(ROOT), str(request)))
        write_whole(script, f"#!/bin/sh\numask 077\nexec {program} >>{log} 2>&1\n", 0o700)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "MEDUET_"))
        }
        with (folder / _SAID[0]).open("ab") as said:
            process = subprocess.Popen(
                [*self.command, str(script)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=folder,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        try:
            while (status := process.poll()) is None:
                look()
                time.sleep(_LOOK_S)
            look()
            return status
        finally:
            _end(process)
            _tell(folder)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs, and what it started here; a scheduler's job looks for itself whether it
    is still waited for (`client/jobs/program.py`)."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _tell(folder: Path) -> None:
    """What launcher and job said goes into the site's own log: their folder will be gone."""
    for path in (folder / name for name in _SAID):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines[-_LINES:]:
            _log.warning("%s: %s", path.stem, line)
        path.unlink(missing_ok=True)
