"""Flower's SuperNode with a client certificate: the site shows who it is before it says a word.

Flower 1.41 speaks TLS to the centre without showing a certificate of its own, so the centre's proxy would
refuse it. This program is `flower-supernode`, with one class changed: connections to the centre carry the
site's certificate. It is run as a program (`client/connection/supernode.py`), with the same arguments.

Five more things a hospital needs. What SuperNode serves to this machine it serves on a socket of its own
account (`federation/programs/local_socket.py`), and no port is open. With a network that drops packets for
two minutes, Flower takes a TLS handshake that nobody answers for a wrong certificate and gives up for good;
here it is a connection that failed, and tried again. A SuperNode that gave up stays as a process that does
nothing, since one of its threads never ends; here the process ends, and its supervisor starts it again. Where
the centre does not accept the signature, as when the clock is off, Flower ends "gracefully"; here it is
said. And Flower runs whatever code the centre sends; here it is checked first
(`client/connection/checked_fetch.py`).

Does not do: anything else; Flower's own checks of the server's certificate and name hold.
Source: flwr 1.41, `flwr/supernode/fleet_http_connection.py`; a private class, pinned with Flower.
"""

import logging
import os
import ssl
from pathlib import Path
from typing import Any, NoReturn

import httpx
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.connection.checked_fetch import checked
from federation.programs.local_socket import serve_on_socket_only

CERTIFICATE, KEY = "MEDUET_CLIENT_CERTIFICATE", "MEDUET_CLIENT_KEY"
"""Environment variables with the paths of the site's certificate and key, PEM."""
STATE = "MEDUET_STATE"
"""Environment variable with the folder of the site's books."""
LOST = 1
"""Exit status of a SuperNode that lost the centre."""
NOT_ACCEPTED = 401
"""Exit code, in words like Flower's, of one whose signature the centre does not accept."""


class MutualTls(FleetHttpClient):
    """Flower's client of the fleet routes, with the site's certificate."""

    def __init__(self, base_url: str, *, verify: Any, **settings: Any) -> None:
        """`verify`: Flower's TLS context, which trusts the consortium's authority and nobody else."""
        if not isinstance(verify, ssl.SSLContext):
            raise ValueError("Expected TLS and the consortium's own root certificate.")
        verify.minimum_version = ssl.TLSVersion.TLSv1_3
        verify.load_cert_chain(os.environ[CERTIFICATE], os.environ[KEY])
        super().__init__(base_url, verify=verify, **settings)

    def _unary_unary(self, **call: Any) -> Any:
        """As Flower's; raises `httpx.ConnectTimeout` where a handshake was not answered in time, and ends
        this process where the centre does not accept the site's signature."""
        try:
            return super()._unary_unary(**call)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                _end(f"The centre does not accept this site's signature. Exit Code: {NOT_ACCEPTED}")
            raise
        except httpx.TransportError as error:
            if "timed out" not in str(error):
                raise
            raise httpx.ConnectTimeout("the centre did not answer in time") from None


def main() -> NoReturn:
    """`flower-supernode`, with the same arguments; ends this process, whatever its threads do."""
    pull = checked(start_client_internal._pull_and_store_message, Path(os.environ[STATE]))
    fleet_http_connection.FleetHttpClient = MutualTls  # type: ignore[attr-defined,assignment]
    serve_on_socket_only()
    start_client_internal._pull_and_store_message = pull
    try:
        flower_supernode()
    except SystemExit:
        raise
    except BaseException:
        logging.getLogger("flwr").exception("SuperNode failed.")
    _end("SuperNode lost the centre.")


def _end(why: str) -> NoReturn:
    logging.getLogger("flwr").error(why)
    logging.shutdown()
    os._exit(LOST)


if __name__ == "__main__":
    main()
