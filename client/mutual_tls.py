"""Flower's SuperNode with a client certificate: the site shows who it is before it says a word.

Flower 1.41 speaks TLS to the centre without showing a certificate of its own, so the centre's proxy would
refuse it. This program is `flower-supernode`, with one class changed: connections to the centre carry the
site's certificate. It is run as a program (`client/supernode.py`), with the same arguments.

Does not do: anything else; Flower's own checks of the server's certificate and name hold.
Source: flwr 1.41, `flwr/supernode/fleet_http_connection.py`; a private class, pinned with Flower.
"""

import os
import ssl
from typing import Any

from flwr.supernode import fleet_http_connection
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

CERTIFICATE, KEY = "MEDUET_CLIENT_CERTIFICATE", "MEDUET_CLIENT_KEY"
"""Environment variables with the paths of the site's certificate and key, PEM."""


class MutualTls(FleetHttpClient):
    """Flower's client of the fleet routes, with the site's certificate."""

    def __init__(self, base_url: str, *, verify: Any, **settings: Any) -> None:
        """`verify`: Flower's TLS context, which trusts the consortium's authority and nobody else."""
        if not isinstance(verify, ssl.SSLContext):
            raise ValueError("Expected TLS and the consortium's own root certificate.")
        verify.minimum_version = ssl.TLSVersion.TLSv1_3
        verify.load_cert_chain(os.environ[CERTIFICATE], os.environ[KEY])
        super().__init__(base_url, verify=verify, **settings)


def main() -> None:
    """`flower-supernode`, with the same arguments."""
    fleet_http_connection.FleetHttpClient = MutualTls  # type: ignore[attr-defined,assignment]
    flower_supernode()


if __name__ == "__main__":
    main()
