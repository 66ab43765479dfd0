"""A real Prometheus that scrapes a page, and what it has then: Debian's `prometheus` and `promtool`.

Where they are not installed, the test is skipped and says so (`apt-get install prometheus`).
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Expected prometheus and promtool on PATH; they are not installed: apt-get install prometheus.",
)
_DEADLINE_S = 60.0


def read(address: str) -> str:
    """What is at an address on loopback, whatever proxy this machine has."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def scraped(page: str, folder: Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every `meduet_` sample that Prometheus holds after scraping `page`, by name and our labels."""
    at = urlsplit(page)
    job = {
        "job_name": "meduet",
        "scrape_interval": "1s",
        "metrics_path": f"{at.path}metrics",
        "static_configs": [{"targets": [at.netloc]}],
    }
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    subprocess.run(["promtool", "check", "config", str(config)], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("w") as log:
        running = subprocess.Popen([*command, f"--web.listen-address={own}"], stdout=log, stderr=log)
    try:
        return _samples(own, folder / "prometheus.log")
    finally:
        running.terminate()
        running.wait(30)


def _samples(own: str, log: Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    deadline = time.monotonic() + _DEADLINE_S
    while not (found := _asked(own, '{__name__=~"meduet_.*"}')):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    assert [float(one["value"][1]) for one in _asked(own, "up")] == [1.0]
    return {
        (one["metric"]["__name__"], _ours(one["metric"])): float(one["value"][1].replace("Inf", "inf"))
        for one in found
    }


def _asked(own: str, query: str) -> list[dict[str, Any]]:
    try:
        answer = read(f"http://{own}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    except urllib.error.URLError:  # not up yet
        return []
    found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
    return found


def _ours(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in labels.items() if k not in ("__name__", "job", "instance")))
