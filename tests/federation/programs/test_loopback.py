"""A proxy variable never catches loopback, whatever else it catches."""

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.checks.proxies import proxy_check
from federation.programs.health import NotServing, check_health
from federation.programs.loopback import LOOPBACK, passes_proxy, spare_loopback


@pytest.mark.parametrize(
    "before", [{}, {"no_proxy": "a.example"}, {"NO_PROXY": "a.example"}, {"no_grpc_proxy": "b.example"}]
)
def test_loopback_joins_the_hosts_that_are_spared_and_none_is_lost(before: dict[str, str]) -> None:
    variables = dict(before)
    spare_loopback(variables)
    spare_loopback(variables)  # a child of a child
    for name in {"no_proxy", *before} - {"NO_PROXY"}:
        hosts = variables[name].split(",")
        assert hosts[-3:] == list(LOOPBACK) and hosts.count("localhost") == 1
    assert all(value in variables[name] for name, value in before.items())
    assert not any(passes_proxy(host, {"http_proxy": "http://p:1", **variables}) for host in LOOPBACK)


def test_a_server_on_loopback_answers_although_a_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # a proxy that never answers
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        server = grpc.server(ThreadPoolExecutor(1))
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with pytest.raises(NotServing):  # the attack: without the defence, nothing connects
                check_health(f"127.0.0.1:{port}", timeout_s=1.0)
            spare_loopback()
            check_health(f"127.0.0.1:{port}", timeout_s=10.0)
        finally:
            server.stop(None)
            for name in ("no_proxy", "NO_PROXY"):
                monkeypatch.delenv(name, raising=False)


def test_check_says_which_proxy_is_set_what_passes_and_no_password() -> None:
    assert proxy_check("centre.example:8443", {}) == ("ok", "no proxy variable is set", "")
    variables = {"https_proxy": "http://user:secret@proxy.example:3128"}
    verdict, found, advice = proxy_check("centre.example:8443", variables)
    assert verdict == "look" and "what goes to centre.example:8443 does" in found and "secret" not in found
    assert "add centre.example to no_proxy" in advice
    spared = {**variables, "no_proxy": ".example"}
    assert proxy_check("centre.example:8443", spared)[0] == "ok"
