"""server.yaml is read strictly; what Flower is told keeps to loopback, and no secret is on a command line."""

import stat
from pathlib import Path

import pytest

from federation.keys.certificates import utc_now
from server.consortium.provisioning import ConsortiumSettings, SiteEntry, open_office, provision
from server.consortium.registrations import site_keys
from server.deployment.config import load_server_config
from server.deployment.superlink import superlink_processes

FULL = """\
state_dir: state
consortium: consortium
port: 18443
health_port: 18444
public_port: 18445
"""
BAD = {
    FULL + "prot: 1\n": "server has no setting 'prot'",
    FULL.replace("consortium: consortium\n", ""): "server lacks consortium",
    FULL.replace("18444", "18443"): "Expected different ports",
    FULL.replace("18445", "70000"): "Expected server.public_port from 1 to 65,535",
    FULL + "proxy: apache\n": "to be one of nginx, none",
    FULL.replace("consortium\n", "elsewhere\n"): "expected server/ca.pem in",
    "- a list\n": "to hold settings",
    "state_dir: [": "it is not YAML",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sites = (SiteEntry(name="north"), SiteEntry(name="south"))
    settings = ConsortiumSettings(name="test", server="centre.example:443", sites=sites)
    provision(settings, tmp_path / "consortium")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def test_paths_in_the_settings_start_at_their_own_folder(folder: Path) -> None:
    config = load_server_config(written(folder, FULL))
    assert (config.state_dir, config.proxy) == (folder / "state", "nginx")
    assert config.certificate == folder / "consortium" / "server" / "server.pem"


def test_the_sites_that_may_take_part_are_those_that_were_not_revoked(folder: Path) -> None:
    config = load_server_config(written(folder, FULL))
    assert list(site_keys(config.consortium)) == ["north", "south"]
    assert site_keys(config.consortium)["north"].read_text().startswith("ecdsa-sha2-nistp384 ")
    open_office(folder / "consortium").revoke("north", utc_now())
    assert list(site_keys(config.consortium)) == ["south"]


@pytest.mark.parametrize("text", BAD)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(folder: Path, text: str) -> None:
    with pytest.raises(ValueError) as error:
        load_server_config(written(folder, text))
    assert BAD[text] in str(error.value) and "server.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_are_not_there_say_where_they_were_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected the centre's settings at .*server\.yaml"):
        load_server_config(tmp_path / "server.yaml")


def test_what_flower_is_told_keeps_to_loopback_and_has_no_secret_on_a_command_line(folder: Path) -> None:
    config = load_server_config(written(folder, FULL))
    superlink, superexec = superlink_processes(config)
    for child in (superlink, superexec):
        addresses = [part for part in child.command if part[:1].isdigit() and "." in part]
        assert addresses and all(part.startswith("127.0.0.1") for part in addresses)
        assert child.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert child.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert child.environment["FLWR_HOME"] == str(folder / "state" / "flower")
    assert "--enable-supernode-auth" in superlink.command
    assert "--disable-runtime-dependency-installation" in superlink.command
    assert superlink.command[superlink.command.index("--isolation") + 1] == "process"
    secret = folder / "state" / "superexec.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and len(secret.read_bytes()) == 32
    before = secret.read_bytes()
    assert all(str(secret) in child.command for child in superlink_processes(config))
    assert secret.read_bytes() == before  # made once
