"""SuperNode's local server with one question of a run, and the process of a task that was told its token.

`hospital_with_a_question.py flower|ours PORT FILE`: Flower's own parts, or ours; the token goes to FILE. The
task itself is kept from taking its question: it looks for the server where there is none.
"""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Context, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec
from flwr.supernode.nodestate import NodeStateFactory

from federation.programs.local_socket import SOCKET, OwnTasks, serve_on_socket_only

RUN = 7


def main(whose: str, port: int, file: Path) -> None:
    """Serve until it is ended."""
    factory = NodeStateFactory(ObjectStoreFactory())
    state = factory.state()
    run = Run.create_empty(RUN)
    run.fab_hash, run.series_id = state.store_fab(Fab("", b"code", {})), 1
    state.store_run(run)
    state.set_run_series_context(1, Context(RUN, 1, {}, RecordDict(), {}))
    task = state.create_task(TaskType.CLIENT_APP, RUN, fab_hash=run.fab_hash)
    assert task is not None
    token = state.claim_task(task)
    assert token is not None
    if whose == "ours":
        serve_on_socket_only()
    settings = SimpleNamespace(
        superexec_auth_secret=b"secret" * 6, host="127.0.0.1", port=port,
        runtime_ssl_certfile=None, runtime_ssl_keyfile=None,
    )  # fmt: skip
    importlib.import_module("flwr.supernode.cli.flower_supernode")._start_supernode_http_api(
        settings, factory
    )
    os.environ[SOCKET] = "/nonexistent/socket"
    file.write_text(token)
    executor = OwnTasks() if whose == "ours" else SubprocessExecutor()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = []
    begin = subprocess.Popen.__init__

    def noted(process: "subprocess.Popen[bytes]", *arguments: object, **more: object) -> None:
        begin(process, *arguments, **more)  # type: ignore[call-overload]
        started.append(process)

    subprocess.Popen.__init__ = noted  # type: ignore[method-assign,assignment]
    executor.launch(
        ExecutionSpec(
            task_type=TaskType.CLIENT_APP, runtime_api_address="127.0.0.1:1", token=token, insecure=True,
            root_certificates_path=None, runtime_dependency_install=False, parent_pid=os.getpid(),
            suppress_output=True, task_id=task,
        )
    )  # fmt: skip
    time.sleep(1.0)
    assert started[0].poll() is None
    sys.stdout.write("a task runs\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
