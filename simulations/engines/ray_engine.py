"""The Ray engine: Flower's simulation, each site in a Ray actor, on this machine or an existing cluster.

The same server function and the same client app as in the process engine, through the same messages; with the
same seed and the same number of threads per site the result is the same. The client app travels to the actors
(cloudpickle, inside Flower), so it must be importable there or made of things that are.
Flower draws its nodes' numbers at random; which node is which site is taken from where it registers them, in
one private function, so that no site has to be believed.
What this file does not do: it configures no cluster.

Whoever reaches Ray runs code as this account, and Ray listens on every interface, whatever address it is told
to have, and keeps its sockets where every account may open them. A Ray that is started here listens on
loopback, asks for a token that only this run knows, and has its files in a folder of this account. One that
is there already is given real scans only if it refuses who has no token.

Flower calls its Python entry point deprecated but offers nothing else that takes a function and an address;
it is pinned with Flower. Telemetry and the update check are turned off.
Source: ray 2.55, `_private/services.py` (get_node_ip_address), `_private/authentication`.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import grpc
from flwr.app import ConfigRecordValues, Context
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.fleet.vce import vce_api
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from simulations.engines.in_process import FixedThreads
from strategies.quorum import numbered
from strategies.streaming_grid import StreamingGrid

Result = TypeVar("Result")
BackendValues = dict[str, ConfigRecordValues]
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch, by the name under which it came: at 0 a node's address is that of loopback, and its
servers bind to that. `_node_ip_address` alone does not: Ray makes the address of the machine of 127.0.0.1."""
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ANSWER_S = 20.0


class NumberedGrid(StreamingGrid):
    """Flower's grid of a simulation, in which each node is registered under the number of its site."""

    def __init__(self, inner: Grid, numbers: Mapping[int, int]) -> None:
        super().__init__(inner)
        self._numbers = numbers

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that this simulation registered."""
        return [numbered(n, self._numbers[n]) for n in self.get_node_ids() if n in self._numbers]


@contextmanager
def _numbers() -> Iterator[Mapping[int, int]]:
    """Site's number by node, of the nodes that Flower registers meanwhile."""
    numbers: dict[int, int] = {}
    register = vce_api._register_nodes

    def noted(*arguments: Any, **named: Any) -> Any:
        registered = register(*arguments, **named)
        numbers.update(registered)
        return registered

    vce_api._register_nodes = noted
    try:
        yield numbers
    finally:
        vce_api._register_nodes = register


def run_on_ray(
    serve: Callable[[Grid], Result],
    client_app: ClientApp,
    num_sites: int,
    *,
    address: str | None = None,
    real_scans: bool = True,
    cpus_per_site: int = 1,
    gpus_per_site: float = 0.0,
) -> Result:
    """Call `serve` with a grid of `num_sites` sites and return what it returns; its exceptions pass.

    `address` ("host:port" or "auto") joins a running cluster, else Ray is started here. Each site gets
    `cpus_per_site` cores and torch threads. Raises `ValueError` when sites with `real_scans` would go to a
    cluster that serves whoever comes.
    """
    results: list[Result] = []
    if address is not None and real_scans:
        check_that_it_asks_for_a_token(address)
    where_ray_is = _own_ray() if address is None else nullcontext({"address": address})
    with where_ray_is as where, _numbers() as numbers:
        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            results.append(serve(NumberedGrid(grid, numbers)))

        run_simulation(
            server_app=server_app,
            client_app=FixedThreads(client_app, cpus_per_site),
            num_supernodes=num_sites,
            backend_config={
                "init_args": {"log_to_driver": False, "logging_level": "ERROR", **where},
                "client_resources": {"num_cpus": cpus_per_site, "num_gpus": gpus_per_site},
            },
        )
    (result,) = results
    return result


@contextmanager
def _own_ray() -> Iterator[BackendValues]:
    """Where a Ray that is started here is to be, and how it is to be closed to everybody else."""
    if "ray" in sys.modules and os.environ.get(_LOOPBACK) != "0":
        raise ValueError("Expected Ray not to be imported yet: it would listen on every interface.")
    os.environ |= {_LOOPBACK: "0", "RAY_AUTH_MODE": "token"}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder = tempfile.mkdtemp(prefix="meduet-", dir="/tmp")  # 0700; a short path, as sockets need
    try:
        yield {
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "_temp_dir": f"{folder}/ray",
        }  # Ray opens its own to all
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_that_it_asks_for_a_token(address: str) -> None:
    """Raise `ValueError` unless a running Ray refuses who has no token."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address_or_die

        address = canonicalize_bootstrap_address_or_die(address)
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary(_ALIVE, request_serializer=None, response_deserializer=None)
        try:
            ask(b"", timeout=_ANSWER_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
            raise ValueError(
                f"Expected Ray at {address} (engine.address); got no answer ({error.code().name})."
            ) from None
    raise ValueError(
        f"Expected Ray at {address} to ask for a token, since real scans go there; it serves whoever comes. "
        "Start it with RAY_AUTH_MODE=token (and so this command), or leave engine.address out."
    )
