"""The Ray engine: Flower's simulation, each site in a Ray actor, on this machine or an existing cluster.

The same server function and the same client app as in the process engine, through the same messages; with the
same seed and the same number of threads per site the result is the same. The client app travels to the actors
(cloudpickle, inside Flower), so it must be importable there or made of things that are.
What this file does not do: it configures no cluster.

Flower calls its Python entry point deprecated but offers nothing else that takes a function and an address;
it is pinned with Flower. Telemetry and the update check are turned off.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from collections.abc import Callable
from typing import TypeVar

from flwr.app import ConfigRecordValues, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from simulations.engines.in_process import FixedThreads

Result = TypeVar("Result")
BackendValues = dict[str, ConfigRecordValues]


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
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(serve(grid))

    init_args: BackendValues = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        init_args["_node_ip_address"] = "127.0.0.1"  # else Ray listens on the machine's address
    else:
        init_args["address"] = address
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
