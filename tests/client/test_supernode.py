"""What a site starts: it calls out with its own certificate, and refuses to start what could not work."""

import dataclasses
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization.ssh import load_ssh_private_key

from client.cli import main
from client.connection import CentreConnection
from client.site import SiteConfig, load_site_config
from client.supernode import supernode_processes
from federation.certificates import Authority, certificate_pem, key_pem, new_key, utc_now
from meduet_models.tokenizer import TokenizerSpec

YAML = """\
name: north
data_root: scans
state_dir: state
tokenizer: {kind: file, path: tokenizer.safetensors, channels: 4}
centre: {address: "centre.example:443", ca: ca.crt, certificate: north.crt, key: north.key, port: 19094}
"""


@pytest.fixture
def site_yaml(tmp_path: Path) -> Path:
    now, key = utc_now(), new_key()
    authority = Authority.create("test", 30, now)
    certificate = authority.site("north", key.public_key(), now + timedelta(days=1), now)
    (tmp_path / "ca.crt").write_bytes(certificate_pem(authority.certificate))
    (tmp_path / "north.crt").write_bytes(certificate_pem(certificate))
    (tmp_path / "north.key").write_bytes(key_pem(key))
    (tmp_path / "north.key").chmod(0o600)
    (tmp_path / "scans").mkdir()
    path = tmp_path / "site.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def config(site_yaml: Path) -> SiteConfig:
    return load_site_config(site_yaml)


def test_the_centre_is_reached_with_the_sites_certificate_and_loopback_with_a_secret(
    config: SiteConfig, site_yaml: Path
) -> None:
    folder = site_yaml.parent
    supernode, superexec = supernode_processes(config, site_yaml)
    told = dict(zip(supernode.command[3::2], supernode.command[4::2], strict=False))
    assert supernode.command[1] == "-P" and supernode.command[2].endswith("mutual_tls.py")
    assert told["--superlink"] == "centre.example:443"
    assert told["--root-certificates"] == str(folder / "ca.crt")
    assert told["--node-config"] == f'site-config="{site_yaml}"'
    assert (told["--host"], told["--port"], told["--isolation"]) == ("127.0.0.1", "19094", "process")
    assert supernode.environment["MEDUET_CLIENT_CERTIFICATE"] == str(folder / "north.crt")
    assert supernode.environment["MEDUET_CLIENT_KEY"] == str(folder / "north.key")
    assert "127.0.0.1:19094" in superexec.command
    secret = told["--superexec-auth-secret-file"]
    assert secret in superexec.command and stat.S_IMODE(Path(secret).stat().st_mode) == 0o600
    node_key = Path(told["--auth-supernode-private-key"])
    assert stat.S_IMODE(node_key.stat().st_mode) == 0o600
    load_ssh_private_key(node_key.read_bytes(), None)


def test_a_key_that_others_may_read_is_refused_with_the_command_that_helps(
    config: SiteConfig, site_yaml: Path
) -> None:
    key = site_yaml.parent / "north.key"
    key.chmod(0o640)
    with pytest.raises(ValueError, match=f"chmod 600 {key}"):
        supernode_processes(config, site_yaml)


def test_what_is_missing_is_named(config: SiteConfig, site_yaml: Path) -> None:
    (site_yaml.parent / "ca.crt").unlink()
    with pytest.raises(ValueError, match=r"Expected centre\.ca in site\.yaml to name a file"):
        supernode_processes(config, site_yaml)
    with pytest.raises(ValueError, match="Expected a section `centre`"):
        supernode_processes(dataclasses.replace(config, centre=None), site_yaml)


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


@pytest.mark.parametrize("address", ["centre.example", "https://centre.example:443", "centre:443/x", ""])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        CentreConnection(address=address, ca=Path("a"), certificate=Path("b"), key=Path("c"))


def test_the_command_says_in_one_line_what_is_wrong(
    site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site_yaml.write_text(YAML.replace("centre.example:443", "centre.example"))
    assert main(["start", "--config", str(site_yaml)]) == 2
    assert capsys.readouterr().out.count("\n") == 1
