"""The page is read-only, for its owner, without scripts; the numbers are OpenMetrics."""

import asyncio
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from federation.watching import Section, Series, Watched, application, openmetrics, token_of

SEEN = Watched(
    "a <b>run</b>", "round 2 of 3",
    [Section("Sites", ("site", "state"), [("<script>x</script>", "asked"), ("south\x1b[2J", "answered")])],
    [
        Series.of("meduet_run_round", "Round", 2),
        Series.by("site", "meduet_site_received_bytes", 'What "it" told', {'no"rth\n': 7.0}, "counter"),
        Series.of("meduet_epsilon", "Charged", float("inf")),
    ],
)  # fmt: skip


def asked(path: str, method: str = "GET", host: str = "127.0.0.1:8600") -> tuple[int, dict[str, str], str]:
    sent: list[Mapping[str, Any]] = []

    async def receive() -> Mapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(application(lambda: SEEN, "secret")(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, sent[1]["body"].decode()


def test_the_page_shows_text_as_text_refreshes_itself_and_loads_nothing() -> None:
    status, headers, body = asked("/secret/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "<script" not in body and "&lt;script&gt;" in body and "\x1b" not in body
    assert '<meta http-equiv="refresh"' in body and "width=device-width" in body
    assert not re.search(r"(src|href)=", body)
    assert headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize(
    ("path", "method", "host", "status"),
    [
        ("/", "GET", "127.0.0.1:8600", 404),
        ("/secreT/", "GET", "127.0.0.1:8600", 404),
        ("/secret/other", "GET", "127.0.0.1:8600", 404),
        ("/secret/", "POST", "127.0.0.1:8600", 405),
        ("/secret/", "GET", "evil.example:8600", 421),
        ("/secret/metrics", "DELETE", "localhost:8600", 405),
    ],
)
def test_only_its_owner_reads_it_and_nobody_writes(path: str, method: str, host: str, status: int) -> None:
    got, _, body = asked(path, method, host)
    assert got == status and "round 2" not in body


def test_numbers_are_openmetrics() -> None:
    status, headers, body = asked("/secret/metrics")
    assert status == 200 and headers["content-type"].startswith("application/openmetrics-text")
    assert body == openmetrics(SEEN.series)
    *lines, end = body.splitlines()
    assert end == "# EOF" and body.endswith("# EOF\n")
    label = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
    sample = rf"[a-z_]+(\{{{label}(,{label})*\}})? (\+Inf|[-0-9.e+]+)"
    for line in lines:
        assert re.fullmatch(rf"# (TYPE [a-z_]+ (gauge|counter)|HELP [a-z_]+ .*)|{sample}", line), line
    assert "meduet_epsilon +Inf" in lines
    assert any(line.startswith("meduet_site_received_bytes_total{") for line in lines)


def test_the_word_in_the_address_stays_and_is_its_owners_alone(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    assert len(token) >= 20 and token_of(tmp_path) == token
    assert stat.S_IMODE((tmp_path / "watch.token").stat().st_mode) == 0o600
