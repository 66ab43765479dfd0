"""Proxy variables, which machines of hospitals set, and loopback, which no proxy must ever catch.

gRPC and urllib read the variables when they connect: `grpc_proxy`, `https_proxy`, `http_proxy`, and hosts
that are spared in `no_grpc_proxy` (gRPC, in place of the other), `no_proxy`. The parts of one site, and the
centre and its proxy, talk on 127.0.0.1; through a hospital's proxy they would wait for ever.

Source: gRPC core, doc/environment_variables.md.
"""

import os
from collections.abc import Mapping, MutableMapping

PROXY_VARIABLES = (
    "grpc_proxy",
    "https_proxy",
    "http_proxy",
    "all_proxy",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "ALL_PROXY",
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def spare_loopback(variables: MutableMapping[str, str] | None = None) -> None:
    """Name loopback among the hosts that no proxy serves, in this process and those it starts."""
    variables = os.environ if variables is None else variables
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy"), ("no_grpc_proxy", "")):
        if name == "no_grpc_proxy" and name not in variables:
            continue  # gRPC then reads no_proxy
        spared = _hosts(variables.get(name, "") or variables.get(other, ""))
        variables[name] = ",".join([*spared, *(host for host in LOOPBACK if host not in spared)])


def passes_proxy(host: str, variables: Mapping[str, str]) -> bool:
    """Whether a connection of gRPC to `host` would pass through a proxy."""
    if not any(variables.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        return False
    spared = _hosts(variables.get("no_grpc_proxy") or variables.get("no_proxy", ""))
    return not any(one == "*" or host == one or host.endswith(f".{one.lstrip('.')}") for one in spared)


def _hosts(text: str) -> list[str]:
    return [host for host in (part.strip() for part in text.split(",")) if host]
