"""The proxy, a real nginx on loopback: certificates decide who gets in, and fleet routes are all there is.

Behind it stands a TLS server that says what reached it, in place of SuperLink; tests/faults has the real one.
"""

import dataclasses
import http.server
import os
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.checks.centre import centre_check, clock_check
from client.connection.keys import SiteKeys
from federation.keys.certificates import (
    Authority,
    certificate_pem,
    crl_pem,
    key_pem,
    new_key,
    read_certificate,
    utc_now,
)
from federation.keys.kits import Connection
from federation.programs.health import NotServing, check_health
from federation.programs.processes import Supervisor
from server.deployment.config import ServerConfig
from server.deployment.proxy import proxy_configuration, proxy_process
from server.deployment.service import Service

HAS_NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is not None
DAY = timedelta(days=1)
NOW = utc_now()


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the path it was asked for."""

    def do_POST(self) -> None:
        body = self.path.encode()
        body += b" %d" % len(self.rfile.read(int(self.headers["content-length"] or 0)))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def client_certificate(authority: Authority, folder: Path, name: str) -> tuple[Path, Path]:
    key, ends = new_key(), NOW + DAY
    certificate, private = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(certificate_pem(authority.site(name, key.public_key(), ends, NOW)))
    private.write_bytes(key_pem(key))
    return certificate, private


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("test", 30, NOW)


@pytest.fixture(scope="module")
def config(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder, key = tmp_path_factory.mktemp("centre"), new_key()
    own = folder / "consortium" / "server"
    own.mkdir(parents=True)
    (own / "ca.pem").write_bytes(certificate_pem(authority.certificate))
    (own / "server.key").write_bytes(key_pem(key))
    certificate = authority.server(key.public_key(), [], NOW + DAY, NOW)
    (own / "server.pem").write_bytes(certificate_pem(certificate))
    (folder / "consortium" / "crl.pem").write_bytes(crl_pem(authority.revocation_list({}, NOW)))
    return ServerConfig(
        state_dir=folder / "state",
        consortium=folder / "consortium",
        port=free_port(),
        health_port=free_port(),
        public_host="127.0.0.1",
        public_port=free_port(),
    )


@pytest.fixture(scope="module")
def behind(config: ServerConfig) -> Iterator[None]:
    """What the proxy stands before: TLS routes, and the health service in clear."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", config.port), Echo)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.certificate, config.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    grpc_server.add_insecure_port(f"127.0.0.1:{config.health_port}")
    grpc_server.start()
    yield
    grpc_server.stop(None).wait()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def proxy(config: ServerConfig, behind: None) -> Iterator[Supervisor]:
    if not HAS_NGINX:
        pytest.skip("needs nginx")
    config.state_dir.mkdir(exist_ok=True)
    with Supervisor([proxy_process(config)], config.state_dir) as supervisor:
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", config.public_port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end, (config.state_dir / "nginx.log").read_text()
                time.sleep(0.05)
        yield supervisor


def post(
    config: ServerConfig,
    path: str,
    certificate: tuple[Path, Path] | None,
    version: str = "TLSv1_3",
    content: bytes = b"x",
) -> tuple[int, str]:
    context = ssl.create_default_context(cafile=str(config.ca))
    context.maximum_version = ssl.TLSVersion[version]
    if certificate:
        context.load_cert_chain(*certificate)
    with httpx.Client(verify=context) as client:
        reply = client.post(f"https://localhost:{config.public_port}{path}", content=content)
    return reply.status_code, reply.text


def test_a_site_with_a_certificate_reaches_the_fleet_routes_and_the_health_service(
    config: ServerConfig, authority: Authority, proxy: Supervisor, tmp_path: Path
) -> None:
    certificate, key = client_certificate(authority, tmp_path, "north")
    status, text = post(config, "/v1/fleet/pull-messages", (certificate, key))
    assert (status, text) == (200, "/v1/fleet/pull-messages 1")
    shown = {"ca": config.ca.read_bytes(), "certificate": certificate.read_bytes(), "key": key.read_bytes()}
    check_health(f"localhost:{config.public_port}", **shown)


def test_a_large_piece_passes_and_is_not_written_to_disk(
    config: ServerConfig, authority: Authority, proxy: Supervisor, tmp_path: Path
) -> None:
    certificate = client_certificate(authority, tmp_path, "north")
    status, text = post(config, "/v1/fleet/push-object", certificate, content=bytes(6_000_000))
    assert (status, text) == (200, "/v1/fleet/push-object 6000000")
    assert not [
        path for path in config.state_dir.rglob("*") if path.is_file() and path.stat().st_size > 10_000
    ]
    assert "temporary file" not in (config.state_dir / "nginx.log").read_text()


def test_a_site_that_checks_learns_whether_the_centre_answers_and_whose_clock_is_wrong(
    config: ServerConfig, authority: Authority, proxy: Supervisor, tmp_path: Path
) -> None:
    certificate, key = client_certificate(authority, tmp_path, "north")
    connection = Connection(consortium="test", site="north", server=f"localhost:{config.public_port}")
    (tmp_path / "site.pem").write_bytes(certificate.read_bytes())
    (tmp_path / "site.key").write_bytes(key.read_bytes())
    (tmp_path / "ca.pem").write_bytes(config.ca.read_bytes())
    keys = SiteKeys(tmp_path, connection, authority.certificate, read_certificate(certificate.read_bytes()))
    assert centre_check(keys)[0] == "ok"
    assert clock_check(keys, utc_now)[0] == "ok"
    for shift_s, verdict in ((-200, "ok"), (-400, "failed"), (30, "failed")):
        shift = timedelta(seconds=shift_s)
        assert clock_check(keys, lambda shift=shift: utc_now() + shift)[0] == verdict
    away = dataclasses.replace(connection, server=f"localhost:{free_port()}")
    for check in (
        centre_check(dataclasses.replace(keys, connection=away)),
        clock_check(dataclasses.replace(keys, connection=away), utc_now),
    ):
        assert check[0] == "failed" and "firewall" in check[2]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run", "/v1/runtime/acquire-task", "/health", "/docs", "/openapi.json", "/",
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run", "//v1/control/start-run", "/V1/CONTROL/start-run",
    ],
)  # fmt: skip
def test_nothing_else_is_reachable_even_with_a_certificate(
    config: ServerConfig, authority: Authority, proxy: Supervisor, tmp_path: Path, path: str
) -> None:
    status, text = post(config, path, client_certificate(authority, tmp_path, "north"))
    assert status in (400, 403)
    assert "control" not in text


def test_without_a_certificate_or_with_another_authoritys_nobody_gets_in(
    config: ServerConfig, proxy: Supervisor, tmp_path: Path
) -> None:
    assert post(config, "/v1/fleet/pull-messages", None)[0] == 400
    stranger = client_certificate(Authority.create("other", 30, NOW), tmp_path, "north")
    assert post(config, "/v1/fleet/pull-messages", stranger)[0] == 400
    with pytest.raises(NotServing):
        check_health(f"localhost:{config.public_port}", ca=config.ca.read_bytes(), timeout_s=2.0)


def test_a_server_certificate_is_not_a_sites(config: ServerConfig, proxy: Supervisor) -> None:
    assert post(config, "/v1/fleet/pull-messages", (config.certificate, config.key))[0] == 400


def test_older_tls_is_refused(
    config: ServerConfig, authority: Authority, proxy: Supervisor, tmp_path: Path
) -> None:
    with pytest.raises(httpx.ConnectError):
        certificate = client_certificate(authority, tmp_path, "north")
        post(config, "/v1/fleet/pull-messages", certificate, "TLSv1_2")


def test_a_revoked_site_is_out_as_soon_as_the_proxy_reads_the_list_again(
    config: ServerConfig, authority: Authority, proxy: Supervisor, tmp_path: Path
) -> None:
    certificate = client_certificate(authority, tmp_path, "east")
    other = client_certificate(authority, tmp_path, "west")
    assert post(config, "/v1/fleet/x", certificate)[0] == 200
    serial = read_certificate(certificate[0].read_bytes()).serial_number
    config.revoked.write_bytes(crl_pem(authority.revocation_list({serial: NOW}, NOW)))
    proxy.signal_child("nginx", signal.SIGHUP)
    until(lambda: post(config, "/v1/fleet/x", certificate)[0] == 400)
    assert post(config, "/v1/fleet/x", other)[0] == 200


def test_the_proxy_dies_with_its_supervisor(config: ServerConfig, behind: None, tmp_path: Path) -> None:
    if not HAS_NGINX:
        pytest.skip("needs nginx")
    own = dataclasses.replace(config, state_dir=tmp_path, public_port=free_port())
    with Supervisor([proxy_process(own)], tmp_path):
        until(lambda: can_connect(own.public_port))
    assert not can_connect(own.public_port)


def test_a_change_of_the_certificates_is_seen(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service notices by the files' times; that nginx then reads them again is tested above."""
    if not HAS_NGINX:
        pytest.skip("needs nginx")
    said: list[str] = []
    service = Service(dataclasses.replace(config, state_dir=tmp_path), said.append)
    monkeypatch.setattr("server.deployment.service._LOOK_S", 0.0)
    sent: list[str] = []
    monkeypatch.setattr(service._supervisor, "signal_child", lambda name, number: sent.append(name))
    service.look()
    assert sent == []
    os.utime(config.certificate, (1, 1))
    service.look()
    service.look()
    assert sent == ["nginx"] and len(said) == 1


def test_another_certificate_of_the_server_restarts_superlink_once_it_fits_its_key(
    config: ServerConfig, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = tmp_path / "consortium"
    shutil.copytree(config.consortium, office)
    own = dataclasses.replace(config, state_dir=tmp_path / "state", consortium=office, proxy="none")
    said: list[str] = []
    service = Service(own, said.append)
    asked: list[str] = []
    monkeypatch.setattr(service._supervisor, "restart", asked.append)
    monkeypatch.setattr("server.deployment.service._LOOK_S", 0.0)

    def renew(key_too: bool = True) -> None:
        key = new_key()
        ends = NOW + 2 * DAY
        own.certificate.write_bytes(certificate_pem(authority.server(key.public_key(), [], ends, NOW)))
        if key_too:
            own.key.write_bytes(key_pem(key))

    service.look()
    os.utime(own.certificate)  # touched, and the same
    service.look()
    assert asked == [] and said == []
    renew(key_too=False)  # half of it
    service.look()
    service.look()
    assert asked == [] and len(said) == 1 and "do not belong together" in said[0]
    renew()
    service.look()
    service.look()
    assert asked == ["superlink"] and f"until {NOW + 2 * DAY:%Y-%m-%d}" in said[1]
    renew()
    service.look()
    assert asked == ["superlink"]  # a minute has to pass first
    monkeypatch.setattr(service, "_next_restart", 0.0)
    service.look()
    assert asked == ["superlink", "superlink"] and len(said) == 3


def test_the_configuration_names_the_list_of_revoked_ones(config: ServerConfig) -> None:
    text = proxy_configuration(config)
    assert f"ssl_crl {config.revoked};" in text and "ssl_verify_client on;" in text


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
