"""Is the other side up? One question to Flower's gRPC health service, with TLS through the proxy or without.

A valid answer through the proxy says at once: the network lets us out, the names and certificates on both
sides hold, and SuperLink runs. Does not do: say whether this site is registered; only Flower's node key shows
that.
"""

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub


class NotServing(ValueError):
    """No answer, or not the right one; one line says what was met."""


def check_health(
    address: str,
    *,
    ca: bytes | None = None,
    certificate: bytes | None = None,
    key: bytes | None = None,
    timeout_s: float = 10.0,
) -> None:
    """Raise `NotServing` unless the health service at `address` (host:port) says that it serves.

    `ca`, `certificate`, `key`: PEM; with `ca`, over TLS, with the others, showing them. Without `ca` in
    clear, which is for this machine only.
    """
    if ca is None:
        channel = grpc.insecure_channel(address)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))
    with channel:
        try:
            reply = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            code, details = error.code(), " ".join(str(error.details()).split())[:300]
            raise NotServing(
                f"Expected the centre's health service at {address}; got {code.name.lower()}: {details}"
            ) from None
    if reply.status != HealthCheckResponse.SERVING:
        raise NotServing(f"Expected the health service at {address} to say that it serves; it does not.")
