"""`meduet-site check` looks at the keys: whose, until when, who can read them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.connection.certificate_checks import certificate_check
from client.connection.keys import install
from server.consortium.provisioning import ConsortiumSettings, SiteEntry, provision

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    settings = ConsortiumSettings(name="heart", server="127.0.0.1:8443", sites=(SiteEntry(name="north"),))
    kit = provision(settings, tmp_path / "office", NOW).kits[0]
    return install(kit, tmp_path / "north", NOW).folder


@pytest.mark.parametrize(
    ("days", "verdict", "said"),
    [(0, "ok", "until 2027-03-01 (365 days)"), (340, "look", "25 days"), (366, "failed", "renew"),
     (-2, "failed", "clock")],
)  # fmt: skip
def test_the_end_of_a_certificate_is_told_in_time(keys: Path, days: int, verdict: str, said: str) -> None:
    found = certificate_check(keys, "north", NOW + timedelta(days=days))
    assert found[0] == verdict and said in found[1]
    assert ("meduet-server renew north" in found[2]) == (verdict != "ok")


def test_keys_of_another_site_that_others_can_read_or_that_are_gone_fail(keys: Path) -> None:
    assert certificate_check(keys, "south", NOW)[:2] == (
        "failed", "the keys are of 'north', site.yaml says 'south'"
    )  # fmt: skip
    (keys / "site.key").chmod(0o640)
    assert certificate_check(keys, "north", NOW)[2].startswith("chmod 600")
    (keys / "site.key").unlink()
    verdict, found, advice = certificate_check(keys, "north", NOW)
    assert verdict == "failed" and "site.key" in found and "meduet-site install" in advice
