"""A supervisor of child processes: starts them, restarts what ends, stops all of them with itself.

Each child has a name, a command, a log file, and pauses that grow from restart to restart (Flower's SuperLink
refuses a SuperNode that was killed for up to 66 s, so giving up early would leave a hospital out). One
supervisor per folder: the second is refused. Its state (`processes.json`) is rewritten whole at every change,
for `status`. Children get SIGTERM when the supervisor dies, however it dies (Linux), and sit in process
groups of their own, so that what they started dies with them. A child that reads files when it starts only
(certificates) is started again when they have changed, a check found them fit, and nobody is disturbed.

Does not do: know Flower, or decide what a child's end means.
"""

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from storage.files import keep_to_owner, private_folder, write_whole
from storage.locks import is_locked, locks

STATE_NAME = "processes.json"
LOCK_NAME = "supervisor.lock"
SPEC_NAME = "supervisor.json"
PAUSES_S = (1.0, 2.0, 5.0, 10.0)
"""Seconds before the first, second, ... restart in a row; the last repeats."""
STEADY_S = 60.0
"""A child that ran this long begins again with the first pause."""
GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL; a supervisor of supervisors needs more than its children."""
_TICK_S = 0.2
_LOOK_S = 2.0  # looking whether the lock is held takes it for a moment
_FILES_LOOK_S = 1.0
_TAIL_BYTES = 20_000
_PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


class AlreadySupervised(ValueError):
    """Another supervisor has this folder."""


@dataclass(frozen=True, kw_only=True)
class ChildProcess:
    """What is to run, always."""

    name: str
    """Short; names the log file and the entry in the state."""
    command: tuple[str, ...]
    """Program and arguments; no secret belongs here, every user of the machine can read it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of the supervisor's own."""
    meanings: Mapping[int, str] = field(default_factory=dict)
    """What this program's exit statuses mean, in the reader's words."""
    exit_pattern: str = ""
    """Regular expression for the exit status in what the program wrote, for one that tells it there; group 1
    is the number. Empty: the status that the system sees."""
    reads_once: tuple[str, ...] = ()
    """Paths of files that the program reads when it starts only. When one has changed, it is started
    again."""
    check: tuple[str, ...] = ()
    """A command that ends with 0 if the changed files are fit; otherwise its last line is said, and the
    program goes on with what it read. Empty: they always are."""
    not_while: str = ""
    """Name of the child that must have no process below it at that moment; empty: at once."""


@dataclass
class _Running:
    child: ChildProcess
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    next_start: float = 0.0
    log_start: int = 0
    restarts: int = 0
    in_a_row: int = 0
    last_exit: int | None = None
    kill_at: float | None = None  # asked to end, in order to be started again; killed at that time
    read: tuple[int, ...] = ()  # times of the files as it read them, or as they were found unfit
    seen: tuple[int, ...] = ()  # ... at the last look: whoever writes several has finished when they stay
    check: subprocess.Popen[str] | None = None
    is_due: bool = False  # to be started again as soon as nobody is disturbed


class Supervisor:
    """Keeps children running in `folder`, which gets their logs and `processes.json`."""

    def __init__(
        self,
        children: Iterable[ChildProcess],
        folder: Path,
        say: Say = lambda line: None,
        pauses_s: tuple[float, ...] = PAUSES_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.folder, self._say, self._pauses_s, self._grace_s = folder, say, pauses_s, grace_s
        self._all = [_Running(child) for child in children]
        self._lock: TextIO | None = None
        self._asked_to_stop = False
        self._next_look = 0.0
        if len({running.child.name for running in self._all}) < len(self._all):
            raise ValueError("Expected every child process to have a name of its own.")

    def __enter__(self) -> "Supervisor":
        """Take the folder and start every child. Raises `AlreadySupervised`."""
        private_folder(self.folder)
        self._lock = (self.folder / LOCK_NAME).open("a+", encoding="utf-8")
        end = time.monotonic() + _LOOK_S
        while not locks(self._lock):
            if time.monotonic() > end:
                self._lock.close()
                raise AlreadySupervised(
                    f"Expected nothing to run in {self.folder}; a supervisor does. Stop it first."
                )
            time.sleep(_TICK_S)
        for running in self._all:
            self._start(running)
        self._write()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop every child, the last first; none is left."""
        self.stop()
        if self._lock is not None:
            self._lock.close()

    def run(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Supervise until SIGTERM or SIGINT, or until `stop_soon`; then return (children still run)."""
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._asked_to_stop:
                self.poll()
                on_tick()
                time.sleep(_TICK_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_soon(self) -> None:
        """Let `run` return after this tick."""
        self._asked_to_stop = True

    def poll(self) -> None:
        """Note who ended, and start again whose pause is over."""
        changed, now = False, time.monotonic()
        if look := now >= self._next_look:
            self._next_look = now + _FILES_LOOK_S
        for running in self._all:
            if running.process is not None and (status := running.process.poll()) is not None:
                self._note_end(running, status, now)
                changed = True
            if running.kill_at is not None and now >= running.kill_at:
                _signal_group(running, signal.SIGKILL, whole=True)
            if running.process is None and now >= running.next_start:
                running.restarts += 1
                self._start(running)
                changed = True
            if look and running.child.reads_once:
                self._look_at_files(running)
        if changed:
            self._write()

    def pid(self, name: str) -> int | None:
        """The process id of a child that runs now."""
        (running,) = [one for one in self._all if one.child.name == name]
        return None if running.process is None else running.process.pid

    def stop(self) -> None:
        """SIGTERM to the children, the last started first; SIGKILL to whole groups after the grace."""
        for running in self._all:
            if running.check is not None:
                running.check.kill()
                running.check.communicate()
                running.check = None
        alive = [running for running in reversed(self._all) if running.process is not None]
        for running in alive:
            _signal_group(running, signal.SIGTERM, whole=False)
        end = time.monotonic() + self._grace_s
        for running in alive:
            assert running.process is not None
            try:
                running.last_exit = running.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"{running.child.name} does not stop: killed")
            _signal_group(running, signal.SIGKILL, whole=True)
            running.last_exit = running.process.wait()
            running.process = None
        self._write(stopped=True)

    def signal_child(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a child that runs; one that does not is left alone."""
        (running,) = [one for one in self._all if one.child.name == name]
        if running.process is not None:
            _signal_group(running, number, whole=False)

    def restart(self, name: str) -> None:
        """Ask a child that runs to end (SIGTERM, SIGKILL after the grace); `poll` starts it again at once.

        Does not wait. One that is not running, or was asked before, is left alone.
        """
        (running,) = [one for one in self._all if one.child.name == name]
        if running.process is not None and running.kill_at is None:
            running.kill_at = time.monotonic() + self._grace_s
            _signal_group(running, signal.SIGTERM, whole=False)

    def _look_at_files(self, running: _Running) -> None:
        """Start a child again for the sake of files that have changed, stay as they are, and are fit."""
        child, now = running.child, _times(running.child.reads_once)
        settled, running.seen = now == running.seen, now
        if settled and now != running.read and running.check is None:
            running.read, running.is_due = now, not child.check
            if child.check:
                running.check = subprocess.Popen(
                    child.check, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    text=True, cwd=self.folder, env={**os.environ, **child.environment},
                    preexec_fn=die_with_parent(),
                )  # fmt: skip
        if running.check is not None and (status := running.check.poll()) is not None:
            lines = running.check.communicate()[0].strip().splitlines() or [""]
            running.check, running.is_due = None, status == 0
            verdict = "taken up" if status == 0 else "not taken up"
            self._say(f"what {child.name} reads has changed, and is {verdict}: {lines[-1]}")
        if running.is_due and (not child.not_while or not _descendants(self.pid(child.not_while))):
            running.is_due = False
            self.restart(child.name)

    def _start(self, running: _Running) -> None:
        child = running.child
        running.read = running.seen = _times(child.reads_once)
        running.is_due = False
        with self._log(running).open("ab") as log:
            running.log_start = log.tell()
            running.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **child.environment},
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # the supervisor has one thread
            )
        running.started = time.monotonic()

    def _note_end(self, running: _Running, status: int, now: float) -> None:
        _signal_group(running, signal.SIGKILL, whole=True)  # what it started and left behind
        if now - running.started >= STEADY_S:
            running.in_a_row = 0
        status = self._told_status(running, status)
        running.process, running.last_exit = None, status
        if running.kill_at is not None:  # as asked: no failure, and no pause
            running.kill_at, running.next_start = None, now
            self._say(f"{running.child.name} ended as asked, and is started again")
            return
        pause = self._pauses_s[min(running.in_a_row, len(self._pauses_s) - 1)]
        running.next_start = now + pause
        running.in_a_row += 1
        meaning = running.child.meanings.get(status, "")
        self._say(
            f"{running.child.name} ended ({_status_words(status)}{': ' if meaning else ''}{meaning}); "
            f"again in {pause:g} s, see {running.child.name}.log"
        )

    def _told_status(self, running: _Running, status: int) -> int:
        """The status that the program told in words, if it tells one and did, else the system's."""
        if not running.child.exit_pattern or status <= 0:
            return status
        with self._log(running).open("rb") as log:
            log.seek(max(running.log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            codes = re.findall(running.child.exit_pattern, log.read().decode("utf-8", "replace"))
        return int(codes[-1]) if codes else status

    def _log(self, running: _Running) -> Path:
        return self.folder / f"{running.child.name}.log"

    def _write(self, stopped: bool = False) -> None:
        processes = {
            running.child.name: {
                "state": "stopped" if stopped else "waiting" if running.process is None else "running",
                "pid": None if running.process is None else running.process.pid,
                "restarts": running.restarts,
                "last_exit": running.last_exit,
            }
            for running in self._all
        }
        state = {
            "pid": None if stopped else os.getpid(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "processes": processes,
        }
        path = self.folder / STATE_NAME
        write_whole(path, json.dumps(state, indent=1) + "\n")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = True


def become_supervisor(children: Iterable[ChildProcess], folder: Path) -> NoReturn:
    """Replace this program by a supervisor of `children` in `folder`, which knows this file only.

    Whoever prepared the children may have loaded hundreds of megabytes; what stays for months is small.
    """
    private_folder(folder)
    spec = folder / SPEC_NAME
    write_whole(spec, json.dumps([dataclasses.asdict(child) for child in children], indent=1))
    os.execv(sys.executable, [sys.executable, "-P", __file__, str(spec)])


def main() -> int:
    """Supervise the children in the file that the first argument names, until SIGTERM or SIGINT."""
    keep_to_owner()
    spec = Path(sys.argv[1])

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    children = []
    for values in json.loads(spec.read_text(encoding="utf-8")):
        meanings = {int(status): words for status, words in values.pop("meanings").items()}
        values |= {name: tuple(values[name]) for name in ("command", "reads_once", "check")}
        children.append(ChildProcess(**{**values, "meanings": meanings}))
    try:
        with Supervisor(children, spec.parent, say) as supervisor:
            say(f"running: {', '.join(child.name for child in children)}; logs in {spec.parent}")
            supervisor.run()
    except AlreadySupervised as error:
        say(str(error))
        return 2
    say("stopped")
    return 0


def read_state(folder: Path) -> dict[str, Any] | None:
    """What the supervisor of `folder` wrote last, None if there never was one; `pid` is None unless it
    lives."""
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not is_locked(folder / LOCK_NAME):
        state["pid"] = None
        for one in state["processes"].values():
            one["state"] = "stopped"
    return state


def _signal_group(running: _Running, number: signal.Signals, whole: bool) -> None:
    assert running.process is not None
    try:
        if whole:
            os.killpg(running.process.pid, number)  # a session leader: its pid is its group
        else:
            running.process.send_signal(number)
    except ProcessLookupError:
        return


def _times(paths: Iterable[str]) -> tuple[int, ...]:
    """When each of the files was written last, ns; 0 for one that is not there."""
    return tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in map(Path, paths))


def _descendants(pid: int | None) -> list[int]:
    """Processes that `pid` started and that live; none of a process that does not run."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listed.read_text(encoding="ascii").split():
            try:
                state = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                found.append(int(child))
    return found


def _status_words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit {status}"


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """A function for the child to call (`preexec_fn`): the kernel sends it this signal when its parent is
    gone, to be exact the thread that started it. Raises `ValueError` where there is no Linux."""
    if not sys.platform.startswith("linux"):
        raise ValueError("Expected Linux: elsewhere children could outlive their supervisor.")
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


if __name__ == "__main__":
    sys.exit(main())
