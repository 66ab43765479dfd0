"""A Ray that is started here is closed to the network and to other accounts; one that is open to whoever
comes gets no real scans."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # a cluster of processes begins in each

ROOT = Path(__file__).parents[3]
RUN = """
import json, os, sys, tempfile
from pathlib import Path

import grpc
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.engines.ray_engine import run_on_ray
from tests.local_account import family, listening

app = ClientApp()

@app.query()
def answer(message, context):
    return Message(RecordDict(), reply_to=message)

def asked(port, method):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method, request_serializer=None, response_deserializer=None)
        try:
            call(b"", timeout=20)
        except grpc.RpcError as error:
            return error.code().name
        return "answered"

def look(grid):
    import ray
    nodes = list(grid.get_node_ids())
    replies = list(grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes]))
    folder = Path(ray._private.worker._global_node.get_temp_dir_path())
    whole = family(os.getpid())
    token = os.environ.get("RAY_AUTH_TOKEN", "none")
    return {
        "replies": len(replies),
        "addresses": sorted(listening(whole)),
        "gcs": asked(ray.get_runtime_context().gcs_address.rpartition(":")[2], sys.argv[1]),
        "folder": oct(folder.parent.stat().st_mode & 0o777),
        "told": [p for p in whole if token in Path(f"/proc/{p}/cmdline").read_text()],
    }

print(json.dumps(run_on_ray(look, app, 2)))
"""
JOIN = """
import os, subprocess, sys
import ray
ray.init(num_cpus=1, _node_ip_address="127.0.0.1", include_dashboard=False, logging_level="ERROR")
address = ray.get_runtime_context().gcs_address
from simulations.engines.ray_engine import check_that_it_asks_for_a_token, run_on_ray
for where in (address, "auto"):
    try:
        check_that_it_asks_for_a_token(where)
        print("token")
    except ValueError as error:
        print(str(error).replace(address, "ADDRESS"))
if len(sys.argv) > 1:
    try:
        run_on_ray(lambda grid: print("served"), None, 1, address=address)
    except ValueError:
        print("no scans")
"""


def ran(script: str, *arguments: str, **variables: str) -> list[str]:
    """What a script says, in a process of its own: Ray leaves children behind."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_ray_of_our_own_listens_on_loopback_asks_for_a_token_and_hides_its_sockets() -> None:
    seen: dict[str, Any] = json.loads(ran(RUN, "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")[-1])
    assert seen["replies"] == 2  # it works for whoever has the token
    assert seen["addresses"] == ["127.0.0.1"]
    assert seen["gcs"] == "UNAUTHENTICATED"
    assert seen["folder"] == "0o700" and seen["told"] == []


def test_a_cluster_that_serves_whoever_comes_gets_no_real_scans() -> None:
    said = ran(JOIN, "run")
    assert all(line.startswith("Expected Ray at ADDRESS to ask for a token") for line in said[:2])
    assert said[2:] == ["no scans"]


def test_a_cluster_that_asks_for_a_token_is_joined() -> None:
    assert ran(JOIN, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="ab" * 32) == ["token", "token"]
