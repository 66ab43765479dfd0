"""Flower's SuperNode with a client certificate: the site shows who it is before it says a word.

Flower 1.41 speaks TLS to the centre without showing a certificate of its own, so the centre's proxy would
refuse it. This program is `flower-supernode`, with one class changed: connections to the centre carry the
site's certificate. It is run as a program (`client/supernode.py`), with the same arguments.

Does not do: anything else; Flower's own checks of the server's certificate and name hold.
Source: flwr 1.41, `flwr/supernode/fleet_http_connection.py`; a private class, pinned with Flower.
"""

import os
import ssl
from collections.abc import Sequence
from typing import Self

from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

CERTIFICATE, KEY = "MEDUET_CLIENT_CERTIFICATE", "MEDUET_CLIENT_KEY"
"""Environment variables with the paths of the site's certificate and key, PEM."""


class MutualTls(FleetHttpClient):
    """Flower's client of the fleet routes, with the site's certificate."""

    @classmethod
    def from_server_address(
        cls,
        server_address: str,
        insecure: bool,
        root_certificates: bytes | str | None,
        interceptors: Sequence[ProtobufClientInterceptor],
        *,
        retry_invoker: RetryInvoker | None = None,
    ) -> Self:
        """A client over TLS 1.3 that trusts `root_certificates` and nobody else."""
        if insecure or not isinstance(root_certificates, bytes):
            raise ValueError("Expected TLS and the consortium's own root certificate.")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=root_certificates.decode("ascii"))
        context.load_cert_chain(os.environ[CERTIFICATE], os.environ[KEY])
        return cls(
            f"https://{server_address}",
            interceptors=interceptors,
            verify=context,
            retry_invoker=retry_invoker,
        )


def main() -> None:
    """`flower-supernode`, with the same arguments."""
    fleet_http_connection.FleetHttpClient = MutualTls  # type: ignore[attr-defined]
    flower_supernode()


if __name__ == "__main__":
    main()
