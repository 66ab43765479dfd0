"""What a cell of bench/round_overhead.py started: each process below this one, its peak memory, its CPU time.

Read from /proc four times a second: VmHWM is the kernel's own high-water mark, so nothing between two looks
is missed but the last quarter of a second of a process. Orphans are adopted (`prctl`), so that nothing that
was started can hide; at the end what still lives is ended by its id, and told.
"""

import ctypes
import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")
ROLES = (
    ("local_socket.py superlink", "SuperLink"),
    ("local_socket.py serverapp", "ServerApp"),
    ("local_socket.py clientapp", "ClientApp"),
    ("connection.mutual_tls", "SuperNode"),
    ("nginx", "nginx"),
    ("local_socket.py superexec", "SuperExec"),
    ("processes.py", "site's supervisor"),
    ("server.cli", "centre's supervisor"),
    ("round_overhead_centre.py", "centre's supervisor"),
)
"""Which command is which, first match; what is none of these (Flower's command line, mostly) is "other"."""
CENTRE = ("SuperLink", "centre's SuperExec", "ServerApp", "nginx", "centre's supervisor")
"""What runs at the centre."""


@dataclass
class Seen:
    """A process, as it was at the last look."""

    pid: int
    role: str
    peak_mb: float = 0.0
    cpu_s: float = 0.0


class Watcher(threading.Thread):
    """Looks at every descendant of this process until `finish`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError("Expected Linux to let this process adopt orphans; it does not.")
        self._seen: dict[tuple[int, str, str], Seen] = {}
        self._done = threading.Event()
        self.together_mb = 0.0
        """Most memory that all of them held at one moment, shared pages counted once for each."""

    def run(self) -> None:
        """Look, until `finish`."""
        while not self._done.wait(_LOOK_S):
            self._look()

    def finish(self) -> list[str]:
        """Stop looking; what still lives after 10 s is killed, and named."""
        self._done.set()
        self.join()
        end = time.monotonic() + 10.0
        while (left := descendants()) and time.monotonic() < end:
            time.sleep(_LOOK_S)
        named = [f"{pid} {_command(pid)[:100]}" for pid in left]
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return named

    def peaks_mb(self) -> dict[str, dict[str, float]]:
        """By role: the largest peak of a process, how many there were, and the CPU seconds of all of them."""
        found: dict[str, dict[str, float]] = defaultdict(
            lambda: {"peak_mb": 0.0, "processes": 0, "cpu_s": 0.0}
        )
        for seen in self._seen.values():
            entry = found[seen.role]
            entry["peak_mb"] = max(entry["peak_mb"], seen.peak_mb)
            entry["processes"] += 1
            entry["cpu_s"] += seen.cpu_s
        return {role: found[role] for role in sorted(found)}

    def _look(self) -> None:
        together = 0.0
        for pid in descendants():
            try:
                stat = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
                status = Path(f"/proc/{pid}/status").read_text("utf-8")
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            memory = {
                line.split(":")[0]: float(line.split()[1]) / 1000 * 1.024
                for line in status.splitlines()
                if line.startswith(("VmHWM", "VmRSS"))
            }
            if not memory:
                continue  # a zombie
            role = _role(_command(pid))
            seen = self._seen.setdefault((pid, stat[19], role), Seen(pid, role))
            seen.peak_mb = max(seen.peak_mb, memory["VmHWM"])
            seen.cpu_s = (int(stat[11]) + int(stat[12])) / _TICKS
            together += memory["VmRSS"]
        self.together_mb = max(self.together_mb, together)


def descendants() -> list[int]:
    """Every living process below this one; zombies are not."""
    children: dict[int, list[int]] = defaultdict(list)
    zombies = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children[int(stat[1])].append(int(folder.name))
        if stat[0] == "Z":
            zombies.add(int(folder.name))
    found, queue = [], [os.getpid()]
    while queue:
        below = children[queue.pop()]
        found += below
        queue += below
    return [pid for pid in found if pid not in zombies]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _role(command: str) -> str:
    role = next((role for part, role in ROLES if part in command), "other")
    if role == "SuperExec":  # the centre's speaks TLS, a site's to its own socket alone
        return "site's SuperExec" if "--insecure" in command else "centre's SuperExec"
    return role
