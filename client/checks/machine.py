"""What `meduet-site check` says of the machine: device and memory, and the folder that the site writes to.

Does not do: know how much a plan's network takes; what is asked for is the least that any plan takes.
"""

import os
import shutil
import stat
from pathlib import Path

import torch

from client.connection.certificate_checks import Finding
from client.settings import SiteConfig, resolve_device

LEAST_MEMORY_BYTES = 2 * 2**30
"""Free memory below which a person should look: a process that answers takes 0.5 GB before its
network and batches (measured), what connects the site 0.3."""
RESERVE_BYTES = 1_000_000_000
"""Free disk space asked for besides encodings: states of a run, logs, Flower's files."""
_MEMINFO = Path("/proc/meminfo")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def device_check(config: SiteConfig) -> Finding:
    """The device that `site.yaml` means, and what is free of its memory."""
    try:
        device = resolve_device(config.device)
    except ValueError as error:
        return "failed", str(error), "Set device: auto or cpu in site.yaml."
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found = f"{torch.cuda.get_device_name(device)}, {_gib(free)} of {_gib(total)} GiB free"
        if free < LEAST_MEMORY_BYTES:
            return "look", found, "What else runs there? nvidia-smi lists it."
        return "ok", found, ""
    threads = config.threads or torch.get_num_threads()
    return "ok", f"CPU, {threads} of {os.cpu_count()} threads", ""


def launcher_check(config: SiteConfig) -> Finding:
    """Whether the program that starts this site's jobs is there; that they run shows with a question."""
    program = config.launcher[0]
    if (path := shutil.which(program)) is None:
        return "failed", f"{program} is not there", "Install it, or correct launcher in site.yaml."
    return "ok", f"{path}; device and memory are those of the machine that it chooses", ""


def memory_check() -> Finding:
    """What is free of this machine's memory, or of its container's."""
    try:
        free, total = _memory()
    except (OSError, KeyError, ValueError):
        return "look", "the memory of this machine cannot be read", "FedMeDUET runs on Linux."
    found = f"{_gib(free)} of {_gib(total)} GiB free"
    if free < LEAST_MEMORY_BYTES:
        advice = (
            f"A process that answers takes 0.5 GB and its network; leave {_gib(LEAST_MEMORY_BYTES)} GiB free."
        )
        return "look", found, advice
    return "ok", found, ""


def folder_check(state_dir: Path) -> Finding:
    """Whether the site's folder can be written, and by nobody else read."""
    advice = f"Give it to the user that runs meduet-site: chown -R meduet {state_dir}"
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        foreign = [path for path in state_dir.iterdir() if not os.access(path, os.W_OK)]
    except OSError as error:
        return "failed", f"{state_dir}: {error.strerror}", advice
    if not os.access(state_dir, os.W_OK | os.X_OK):
        return "failed", f"{state_dir} cannot be written by this user", advice
    if foreign:
        return "failed", f"{len(foreign)} things in {state_dir} cannot be written by this user", advice
    if mode := stat.S_IMODE(state_dir.stat().st_mode) & 0o077:
        found = f"{state_dir} is open to others (mode {mode:03o} beyond the owner's); it holds patient data"
        return "look", found, f"chmod 700 {state_dir}"
    return "ok", str(state_dir), ""


def disk_check(state_dir: Path, encodings_bytes: int = 0, at_least: bool = False) -> Finding:
    """Free space on the disk of `state_dir`, against what is still to be written there, or at least that."""
    free, needed = shutil.disk_usage(state_dir).free, encodings_bytes + RESERVE_BYTES
    found = f"{free / 1e9:.1f} GB free, {'at least ' * at_least}{needed / 1e9:.2g} GB needed"
    if free < needed:
        return "failed", found, "Free space, or move state_dir to a larger disk."
    if at_least:
        return "ok", found, "Whole scans: how large their encodings are is known once some are prepared."
    return "ok", found, ""


def _memory() -> tuple[int, int]:
    """Bytes free and in all; the narrower of the machine's and the container's."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="utf-8").splitlines())
    free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit = _LIMIT.read_text(encoding="utf-8").strip() if _LIMIT.is_file() else "max"
    if limit != "max":
        room = int(limit) - int(_USED.read_text(encoding="utf-8"))
        free, total = min(free, room), min(total, int(limit))
    return max(0, free), total


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
