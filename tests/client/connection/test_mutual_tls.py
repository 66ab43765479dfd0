"""SuperNode as we start it: shows its certificate, is patient with a silent network, ends when it is over."""

import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest

from client.connection.keys import install
from client.connection.mutual_tls import CERTIFICATE, KEY, LOST, STATE, MutualTls, main
from federation.keys.certificates import utc_now
from server.consortium.provisioning import ConsortiumSettings, SiteEntry, provision


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    settings = ConsortiumSettings(name="test", server="localhost:443", sites=(SiteEntry(name="north"),))
    (kit,) = provision(settings, tmp_path / "consortium").kits
    folder = install(kit, tmp_path, utc_now()).folder
    monkeypatch.setenv(CERTIFICATE, str(folder / "site.pem"))
    monkeypatch.setenv(KEY, str(folder / "site.key"))
    return ssl.create_default_context(cafile=str(folder / "ca.pem"))


def test_a_handshake_that_nobody_answers_is_a_connection_to_be_tried_again(tls: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = MutualTls(f"https://127.0.0.1:{silent.getsockname()[1]}", verify=tls)
        client._client.timeout = httpx.Timeout(0.5)
        with pytest.raises(httpx.ConnectTimeout) as error:
            client.PullMessages(PullMessagesRequest())
    # Flower gives up for good on whatever names one of these
    assert not any(word in str(error.value).lower() for word in ("certificate", "ssl", "tls"))


def test_without_tls_it_does_not_start() -> None:
    with pytest.raises(ValueError, match="Expected TLS and the consortium's own root certificate"):
        MutualTls("http://127.0.0.1:1", verify=True)


def test_a_supernode_that_gave_up_ends_whatever_its_threads_do() -> None:
    program = (
        "import threading, time\n"
        "import client.connection.mutual_tls as program\n"
        "program.os.environ[program.STATE] = '.'\n"
        "program.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "program.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert done.returncode == LOST


def test_without_the_folder_of_its_books_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATE, raising=False)
    with pytest.raises(KeyError, match=STATE):
        main()


def test_a_signature_that_is_not_accepted_is_said_and_ends_the_process() -> None:
    program = (
        "import httpx\n"
        "import client.connection.mutual_tls as program\n"
        "from flwr.supernode.fleet_http_client import FleetHttpClient\n"
        "def refused(self, **call):\n"
        "    request = httpx.Request('POST', 'https://centre/v1/fleet/pull-messages')\n"
        "    response = httpx.Response(401, request=request)\n"
        "    raise httpx.HTTPStatusError('no', request=request, response=response)\n"
        "FleetHttpClient._unary_unary = refused\n"
        "program.MutualTls.PullMessages(program.MutualTls.__new__(program.MutualTls), None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == LOST
    assert "does not accept this site's signature. Exit Code: 401" in done.stdout + done.stderr
