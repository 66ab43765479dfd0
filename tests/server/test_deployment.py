"""server.yaml is read strictly; what Flower is told keeps to loopback, and no secret is on a command line."""

import stat
from pathlib import Path

import pytest

from server.deployment import load_server_config
from server.superlink import superlink_processes

FULL = """\
state_dir: state
ca: ca.crt
certificate: server.crt
key: server.key
sites: {north: north.pub}
revoked: revoked.crl
port: 18443
health_port: 18444
public_port: 18445
"""
BAD = {
    FULL + "prot: 1\n": "server has no setting 'prot'",
    FULL.replace("ca: ca.crt\n", ""): "server lacks ca",
    FULL.replace("18444", "18443"): "Expected different ports",
    FULL.replace("18445", "70000"): "Expected different ports from 1 to 65535",
    FULL + "proxy: apache\n": "to be one of nginx, none",
    FULL.replace("north.pub", "south.pub"): "expected north to name a file",
    FULL.replace("revoked.crl", "gone.crl"): "expected revoked to name a file",
    FULL.replace("{north: north.pub}", "[north]"): "server.sites to be a mapping",
    "- a list\n": "to hold settings",
    "ca: [": "to be a readable YAML file",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ca.crt", "server.crt", "server.key", "north.pub", "revoked.crl"):
        (tmp_path / name).write_text(name)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def test_paths_in_the_settings_start_at_their_own_folder(folder: Path) -> None:
    config = load_server_config(written(folder, FULL))
    assert config.state_dir == folder / "state" and config.sites == {"north": folder / "north.pub"}
    assert (config.ca, config.revoked, config.proxy) == (folder / "ca.crt", folder / "revoked.crl", "nginx")


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
