"""The centre's page: a run's present and its numbers, from the files that `status` reads."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from federation.watching import openmetrics, page, serving
from server.deployment.status import StatusFile
from server.deployment.watch import watched
from server.run_folder import held, write_metrics
from tests.scraping import needs_prometheus, read, scraped
from tests.worlds import SITES, small_plan

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in its second round: one site has answered, one is awaited, one was put aside in the first."""
    plan, made = small_plan(), tmp_path / "run"
    status = StatusFile(plan, made)
    (made / "plan.json").write_text(plan.to_json())
    one = {"examples": 12, "seconds": 1.5, "loss": {"total": 4.0}, "bytes_up": 10_000, "bytes_down": 20_000}
    status.on_round_start(1, 3)
    status.on_site_reply(1, SITES[0], one)
    refused = {SITES[2]: "norm: far longer than the median"}
    report = {
        "round": 1,
        "seconds": 2.0,
        "refused": refused,
        "loss": {"total": 4.0},
        "sites": {SITES[0]: one},
    }
    status.on_round_end(1, {}, report)
    write_metrics(made, {"rounds": [report]})
    status.on_round_start(2, 3)
    status.on_site_reply(2, SITES[0], one)
    return made


def test_the_page_says_what_is_waited_for_and_what_was_promised(folder: Path) -> None:
    with held(folder):
        text = page(watched(folder))
    assert "round 2 of 3" in text and f"waiting for {SITES[1]}, {SITES[2]}" in text
    assert "far longer than the median" in text
    assert "bounded, not differentially private" in text
    assert "never" in text and "s ago" in text
    assert "interrupted" in page(watched(folder)), "nobody holds the run now: its process has ended"


def test_there_are_twenty_series_and_none_is_of_one_patient(folder: Path) -> None:
    with held(folder):
        text = openmetrics(watched(folder).series)
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert len(names) >= 20
    assert "meduet_sites_awaited 2.0" in text and 'meduet_epsilon{release="round"} +Inf' in text
    assert f'meduet_site_received_bytes_total{{site="{SITES[0]}"}} 20000.0' in text
    assert 'meduet_put_aside_total{reason="invalid_reply"} 1.0' in text
    assert 'meduet_phase_seconds_total{phase="round"}' in text
    told = {line.rsplit(" ", 1)[1] for line in text.splitlines() if not line.startswith("#")}
    assert "examples" not in text and "12.0" not in told, "a site's count of patients is no series"


@needs_prometheus
def test_prometheus_scrapes_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    with held(folder), serving(lambda: watched(folder), tmp_path) as address:
        found = scraped(address, tmp_path)
        told = {one.name: one for one in watched(folder).series}
    assert len({name.removesuffix("_total") for name, _ in found}) >= 20
    for name, labels in found:
        assert labels in told[name.removesuffix("_total")].samples
    assert found["meduet_sites_awaited", ()] == 2
    assert found["meduet_epsilon", (("release", "round"),)] == float("inf")
    assert found["meduet_site_received_bytes_total", (("site", SITES[0]),)] == 20_000


def test_the_command_prints_its_address_serves_both_and_ends_with_a_signal(folder: Path) -> None:
    program = [sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())"]
    started = subprocess.Popen(
        [*program, "watch", str(folder), "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert started.stdout is not None
        address = started.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        assert "round 2 of 3" in read(address)
        assert read(f"{address}metrics").endswith("# EOF\n")
    finally:
        started.send_signal(signal.SIGINT)
        status = started.wait(30)
        started.stdout.close()  # type: ignore[union-attr]
    assert status in (0, 130)
    assert json.loads((folder / "status.json").read_text())["round"] == 2
