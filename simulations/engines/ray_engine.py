"""The Ray engine: Flower's simulation, each site in a Ray actor, on this machine or an existing cluster.

The same server function and the same client app as in the process engine, through the same messages; with the
same seed and the same number of threads per site the result is the same. The client app travels to the actors
(cloudpickle, inside Flower), so it must be importable there or made of things that are.
Flower draws its nodes' numbers at random; which node is which site is taken from where it registers them, in
one private function, so that no site has to be believed.
What this file does not do: it configures no cluster.

Flower calls its Python entry point deprecated but offers nothing else that takes a function and an address;
it is pinned with Flower. Telemetry and the update check are turned off.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

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
    cpus_per_site: int = 1,
    gpus_per_site: float = 0.0,
) -> Result:
    """Call `serve` with a grid of `num_sites` sites and return what it returns; its exceptions pass.

    `address` ("host:port" or "auto") joins a running cluster, else Ray is started here. Each site gets
    `cpus_per_site` cores and torch threads.
    """
    results: list[Result] = []
    init_args: BackendValues = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        init_args["_node_ip_address"] = "127.0.0.1"  # else Ray listens on the machine's address
    else:
        init_args["address"] = address
    with _numbers() as numbers:
        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            results.append(serve(NumberedGrid(grid, numbers)))

        run_simulation(
            server_app=server_app,
            client_app=FixedThreads(client_app, cpus_per_site),
            num_supernodes=num_sites,
            backend_config={
                "init_args": init_args,
                "client_resources": {"num_cpus": cpus_per_site, "num_gpus": gpus_per_site},
            },
        )
    (result,) = results
    return result
