"""What a site starts: it calls out with its own certificate, and refuses to start what could not work."""

import dataclasses
import stat
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization.ssh import load_ssh_private_key

from client.cli import main
from client.connection.keys import install
from client.connection.supernode import supernode_processes
from client.settings import SiteConfig, load_site_config
from federation.keys.certificates import utc_now
from meduet_models.tokenizer.tokenizer import TokenizerSpec
from server.consortium.provisioning import ConsortiumSettings, SiteEntry, open_office, provision

YAML = """\
name: north
data_root: scans
state_dir: state
keys_dir: keys
tokenizer: {kind: file, path: tokenizer.safetensors, channels: 4}
"""


@pytest.fixture
def site_yaml(tmp_path: Path) -> Path:
    sites = (SiteEntry(name="north"),)
    settings = ConsortiumSettings(name="test", server="centre.example:443", sites=sites)
    (kit,) = provision(settings, tmp_path / "consortium").kits
    install(kit, tmp_path, utc_now())
    (tmp_path / "scans").mkdir()
    path = tmp_path / "site.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def config(site_yaml: Path) -> SiteConfig:
    return load_site_config(site_yaml)


def test_the_centre_is_reached_with_the_sites_certificate_and_this_machine_by_a_socket_with_a_secret(
    config: SiteConfig, site_yaml: Path
) -> None:
    folder = site_yaml.parent
    supernode, superexec = supernode_processes(config, site_yaml)
    options = dict(zip(supernode.command[5::2], supernode.command[6::2], strict=False))
    assert supernode.command[1:3] == ("-P", "-c") and "mutual_tls" in supernode.command[3]
    assert options["--superlink"] == "centre.example:443"
    assert options["--root-certificates"] == str(folder / "keys" / "ca.pem")
    assert options["--node-config"] == f'site-config="{site_yaml}"'
    assert options["--isolation"] == "process" and not {"--host", "--port"} & set(supernode.command)
    assert supernode.environment["MEDUET_CLIENT_CERTIFICATE"] == str(folder / "keys" / "site.pem")
    assert supernode.environment["MEDUET_CLIENT_KEY"] == str(folder / "keys" / "site.key")
    for child in (supernode, superexec):
        assert child.environment["MEDUET_FLOWER_SOCKET"] == str(folder / "state/processes/supernode.sock")
    secret = options["--superexec-auth-secret-file"]
    assert secret in superexec.command and stat.S_IMODE(Path(secret).stat().st_mode) == 0o600
    node_key = Path(options["--auth-supernode-private-key"])
    assert stat.S_IMODE(node_key.stat().st_mode) == 0o600
    load_ssh_private_key(node_key.read_bytes(), None)


def test_where_applications_are_unpacked_is_closed_to_others_even_if_somebody_opened_it(
    config: SiteConfig, site_yaml: Path
) -> None:
    supernode, superexec = supernode_processes(config, site_yaml)
    home = Path(supernode.environment["FLWR_HOME"])
    assert superexec.environment["FLWR_HOME"] == str(home)
    assert supernode.environment["MEDUET_STATE"] == str(config.state_dir)
    home.chmod(0o777)
    supernode_processes(config, site_yaml)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_renewed_certificate_is_watched_for_and_only_one_that_checks_out_is_taken_up(
    config: SiteConfig, site_yaml: Path, tmp_path: Path
) -> None:
    supernode, superexec = supernode_processes(config, site_yaml)
    keys = site_yaml.parent / "keys"
    assert {str(keys / "site.pem"), str(keys / "site.key"), str(keys / "ca.pem")} <= {*supernode.reads_once}
    assert supernode.not_while == superexec.name  # which starts a process for each question

    def check() -> tuple[int, str]:
        done = subprocess.run(supernode.check, capture_output=True, text=True, cwd=tmp_path, check=False)
        return done.returncode, done.stdout

    before = (keys / "site.pem").read_bytes()
    renewed = open_office(tmp_path / "consortium").renew_site("north", utc_now() + timedelta(minutes=1))
    install(renewed, tmp_path, utc_now() + timedelta(minutes=2))
    assert (keys / "site.pem").read_bytes() != before
    status, said = check()
    assert (status, said.count("\n")) == (0, 1) and "of test, until" in said
    (keys / "site.pem").write_bytes((keys / "ca.pem").read_bytes())
    status, said = check()
    assert (status, said.count("\n")) == (1, 1) and "for another" in said


def test_a_key_that_others_may_read_is_refused_with_the_command_that_helps(
    config: SiteConfig, site_yaml: Path
) -> None:
    key = site_yaml.parent / "keys" / "site.key"
    key.chmod(0o640)
    with pytest.raises(ValueError, match=f"chmod 600 {key}"):
        supernode_processes(config, site_yaml)


def test_what_is_missing_or_does_not_belong_is_named(config: SiteConfig, site_yaml: Path) -> None:
    with pytest.raises(ValueError, match="the keys are of 'north'"):
        supernode_processes(dataclasses.replace(config, name="south"), site_yaml)
    with pytest.raises(ValueError, match=r"Expected keys_dir in site\.yaml"):
        supernode_processes(dataclasses.replace(config, keys_dir=None), site_yaml)
    (site_yaml.parent / "keys" / "ca.pem").unlink()
    with pytest.raises(ValueError, match="Expected the authority's certificate"):
        supernode_processes(config, site_yaml)


def test_a_tokenizer_that_the_application_would_not_find_is_refused_with_the_line_to_write(
    config: SiteConfig, site_yaml: Path
) -> None:
    shipped = dataclasses.replace(config, tokenizer=TokenizerSpec())
    with pytest.raises(ValueError, match="Write: tokenizer: ") as error:
        supernode_processes(shipped, site_yaml)
    line = str(error.value).split("Write: ")[1]
    kept = [row for row in YAML.splitlines() if not row.startswith("tokenizer")]
    site_yaml.write_text("\n".join([*kept, line]) + "\n")
    supernode_processes(load_site_config(site_yaml), site_yaml)  # the advice holds


def test_the_command_says_in_one_line_what_is_wrong(
    site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site_yaml.write_text(YAML + "threads: -1\n")
    assert main(["start", "--config", str(site_yaml)]) == 2
    assert capsys.readouterr().out.count("\n") == 1
