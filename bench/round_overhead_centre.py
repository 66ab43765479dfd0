"""`meduet-server start` with Flower's state in memory in place of sqlite, for bench/round_overhead.py.

    python bench/round_overhead_centre.py SERVER_YAML          until SIGTERM

Everything else is the centre as it is. A file of its own, so that it holds no more memory than the real one.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from federation.programs.processes import ChildProcess
from server.deployment import service
from server.deployment.config import ServerConfig, load_server_config
from server.deployment.superlink import superlink_processes

IN_MEMORY = ":flwr-in-memory:"
"""Flower's name for a state that is no file."""


def without_file(config: ServerConfig) -> tuple[ChildProcess, ...]:
    """The centre's processes, the database's path replaced."""
    file = str(config.state_dir / "superlink.db")
    return tuple(
        replace(child, command=tuple(IN_MEMORY if part == file else part for part in child.command))
        for child in superlink_processes(config)
    )


if __name__ == "__main__":
    service.superlink_processes = without_file
    service.Service(load_server_config(Path(sys.argv[1])), lambda line: print(line, flush=True)).run()
