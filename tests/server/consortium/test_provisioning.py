"""The office for keys and the sites' side of it, together: kits, requests, renewal, revocation."""

import io
import stat
import subprocess
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from rich.console import Console

import client.cli
import server.cli
from client.connection.keys import SiteKeys, install, request_certificate
from federation.journal import Journal
from federation.keys.certificates import (
    CertificateRefused,
    check_certificate,
    key_fingerprint,
    read_certificate,
)
from federation.keys.kits import CHECKSUMS, KEY, pack_kit, unpack_kit
from server.consortium.provisioning import Office, load_consortium, open_office, provision

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=300)
YAML = """\
name: hippocampus
server: meduet.example.org:8443
sites:
  - name: north
  - name: south
    expires: 2026-06-30
  - name: west
    key: site
"""


@pytest.fixture
def consortium(tmp_path: Path) -> Path:
    path = tmp_path / "consortium.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def office(consortium: Path, tmp_path: Path) -> Office:
    return provision(load_consortium(consortium), tmp_path / "office", NOW).office


def kit(office: Office, site: str) -> Path:
    return office.folder / "kits" / f"{site}.zip"


def revoked(office: Office) -> set[int]:
    revocations = x509.load_pem_x509_crl((office.folder / "crl.pem").read_bytes())
    assert revocations.is_signature_valid(office.authority.key.public_key())
    return {one.serial_number for one in revocations}


def test_kits_install_and_every_secret_is_its_owners_alone(office: Office, tmp_path: Path) -> None:
    keys = install(kit(office, "north"), tmp_path / "north", NOW)
    assert (keys.connection.site, keys.connection.server) == ("north", "meduet.example.org:8443")
    assert keys.authority_fingerprint == office.fingerprint
    assert keys.check(NOW) == NOW + timedelta(days=365)
    check_certificate(
        read_certificate((office.folder / "server" / "server.pem").read_bytes()),
        keys.authority,
        "meduet.example.org",
        NOW,
    )
    secrets = [*office.folder.rglob("*.key"), *office.folder.rglob("*.zip"), *keys.folder.glob("*.key")]
    assert len(secrets) == 6  # authority, server, two kits; the site's key in two formats
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    folders = [office.folder, office.folder / "kits", office.folder / "server", keys.folder]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    assert (office.folder / "sites" / "north" / "node.pub").read_bytes() == (
        keys.folder / "node.pub"
    ).read_bytes()
    assert (
        install(kit(office, "south"), tmp_path / "south", NOW).check(NOW).date().isoformat() == "2026-06-30"
    )
    assert not kit(office, "west").exists()


def test_the_readme_says_what_to_type_and_the_settings_are_read_strictly(
    office: Office, tmp_path: Path
) -> None:
    files = unpack_kit(kit(office, "north").read_bytes())
    readme = files["README.txt"].decode()
    assert office.fingerprint in readme
    typed = [line.strip() for line in readme.splitlines() if line.startswith("     meduet-site ")]
    for command in typed:
        name = command.split()[1]
        if name != "start":  # of another module
            with pytest.raises(SystemExit) as done:
                client.cli.main([name, "--help"])
            assert done.value.code == 0
    assert len(typed) == 8
    install(kit(office, "north"), tmp_path / "north", NOW)
    from client.settings import load_site_config

    config = load_site_config(tmp_path / "north" / "site.yaml")
    assert config.name == "north" and not config.allow_non_private and config.plan_approval == "required"
    assert config.keys_dir == tmp_path / "north" / "keys"


def test_provisioning_again_changes_nothing_and_a_new_site_gets_its_kit(
    office: Office, consortium: Path
) -> None:
    before = {path: path.read_bytes() for path in office.folder.rglob("*") if path.is_file()}
    again = provision(load_consortium(consortium), office.folder, LATER)
    assert (again.created, again.kits, again.awaited) == (False, (), ("west",))
    after = {path: path.read_bytes() for path in office.folder.rglob("*") if path.is_file()}
    assert {p for p in after if after[p] != before[p]} == {
        office.folder / "crl.pem"
    }  # written anew, same root
    consortium.write_text(YAML + "  - name: east\n")
    assert [k.stem for k in provision(load_consortium(consortium), office.folder, LATER).kits] == ["east"]


def test_an_authority_is_never_overwritten(office: Office, consortium: Path) -> None:
    consortium.write_text(YAML.replace("hippocampus", "heart"))
    with pytest.raises(ValueError, match="not overwritten"):
        provision(load_consortium(consortium), office.folder, NOW)
    consortium.write_text(YAML)
    key = (office.folder / "ca.key").read_bytes()
    (office.folder / "ca.key").unlink()  # taken offline
    with pytest.raises(ValueError, match=r"Restore ca\.key"):
        provision(load_consortium(consortium), office.folder, NOW)
    (office.folder / "ca.key").write_bytes(key)
    assert open_office(office.folder).fingerprint == office.fingerprint


def test_keys_are_not_written_into_a_git_work_tree(consortium: Path, office: Office, tmp_path: Path) -> None:
    tree = tmp_path / "checkout"
    (tree / ".git").mkdir(parents=True)
    inside = tree / "deep" / "er"
    for attempt in (
        lambda: provision(load_consortium(consortium), inside, NOW),
        lambda: install(kit(office, "north"), inside, NOW),
        lambda: request_certificate("west", inside),
    ):
        with pytest.raises(ValueError, match="git work tree"):
            attempt()
    assert list(tree.iterdir()) == [tree / ".git"]


def test_a_site_that_keeps_its_key_is_approved_by_fingerprint(office: Office, tmp_path: Path) -> None:
    request, fingerprint = request_certificate("west", tmp_path / "west")
    key = (tmp_path / "west" / "keys" / KEY).read_bytes()
    with pytest.raises(ValueError, match="Nothing was signed"):
        office.approve(request.read_bytes(), fingerprint[:-1], NOW)
    packed = office.approve(request.read_bytes(), fingerprint.lower().replace(" ", ""), NOW)
    assert KEY not in unpack_kit(packed.read_bytes())
    everywhere = b"".join(path.read_bytes() for path in office.folder.rglob("*") if path.is_file())
    assert key not in everywhere
    keys = install(packed, tmp_path / "west", NOW)
    assert keys.connection.site == "west" and (keys.folder / KEY).read_bytes() == key
    assert request_certificate("west", tmp_path / "west")[1] == fingerprint  # the same key asks again
    with pytest.raises(ValueError, match="kit holds none"):
        install(packed, tmp_path / "elsewhere", NOW)
    stranger, said = request_certificate("stranger", tmp_path / "stranger")
    with pytest.raises(ValueError, match="listed are north, south, west"):
        office.approve(stranger.read_bytes(), said, NOW)


def test_a_renewal_keeps_the_key_and_the_root(office: Office, tmp_path: Path) -> None:
    keys = install(kit(office, "north"), tmp_path / "north", NOW)
    path = office.renew_site("north", LATER)
    renewed = install(path, tmp_path / "north", LATER)
    assert renewed.check(LATER) == LATER + timedelta(days=365)
    assert renewed.authority == keys.authority and revoked(office) == set()
    assert (renewed.folder / "node.pub").read_bytes() == (
        office.folder / "sites" / "north" / "node.pub"
    ).read_bytes()
    before = read_certificate((office.folder / "server" / "server.pem").read_bytes())
    after = read_certificate(office.renew_server(LATER).read_bytes())
    assert after.serial_number != before.serial_number
    check_certificate(after, keys.authority, "127.0.0.1", LATER)
    with pytest.raises(CertificateRefused, match="end after now"):
        office.renew_site("south", LATER)  # consortium.yaml says until when


def test_a_revoked_site_is_on_the_list_for_good_and_comes_back_with_another_key(
    office: Office, tmp_path: Path
) -> None:
    office.renew_site("north", NOW)
    own = {one.serial for one in office.issued() if one.name == "north"}
    office.revoke("north", LATER)
    assert len(own) == 2 and revoked(office) == own
    office.revoke("north", LATER + timedelta(days=1))
    assert revoked(office) == own
    assert provision(office.settings, office.folder, LATER).kits == ()
    with pytest.raises(ValueError, match="not revoked"):
        office.renew_site("north", LATER)
    old = install(kit(office, "north"), tmp_path / "north", NOW)
    request, fingerprint = request_certificate("north", tmp_path / "north")
    assert fingerprint == key_fingerprint(old.certificate.public_key())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was not revoked"):
        office.approve(request.read_bytes(), fingerprint, LATER)
    request, fingerprint = request_certificate("north", tmp_path / "anew")
    office.approve(request.read_bytes(), fingerprint, LATER)
    assert revoked(office) == own
    assert office.current("north") is not None
    with pytest.raises(ValueError, match="was not"):
        office.revoke("stranger", LATER)


def test_a_new_key_of_a_site_revokes_its_old_one(office: Office, tmp_path: Path) -> None:
    old = office.current("north")
    request, fingerprint = request_certificate("north", tmp_path / "anew")
    office.approve(request.read_bytes(), fingerprint, NOW)
    assert old is not None and revoked(office) == {old.serial}


def test_the_book_of_certificates_shows_tampering(office: Office) -> None:
    office.revoke("north", NOW)
    path = office.folder / "journal.jsonl"
    kept = [line for line in path.read_text().splitlines(True) if '"revocation"' not in line]
    path.write_text("".join(kept) + path.read_text().splitlines(True)[-1].replace("north", "south"))
    with pytest.raises(ValueError, match="line 5"):
        open_office(office.folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: {**f, "site.pem": f["site.pem"].replace(b"A", b"B", 1)}, "PEM|another one"),
        (lambda f: {**f, "connection.yaml": f["connection.yaml"].replace(b"north", b"south")}, "another"),
        (lambda f: {**f, "../evil": b""}, "too many"),
        (lambda f: {name: f[name] for name in f if name != "ca.pem"}, r"ca\.pem"),
    ],
)
def test_kits_that_were_made_otherwise_install_nothing(
    office: Office, tmp_path: Path, change: object, why: str
) -> None:
    files = unpack_kit(kit(office, "north").read_bytes())
    forged = tmp_path / "north.zip"
    forged.write_bytes(pack_kit(change(files)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=why):
        install(forged, tmp_path / "north", NOW)
    assert not (tmp_path / "north").exists()


def test_a_damaged_kit_is_found_by_its_checksums(office: Office, tmp_path: Path) -> None:
    with zipfile.ZipFile(kit(office, "north")) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    subprocess.run(
        ["sha256sum", "--check", "--strict", CHECKSUMS],
        cwd=_laid_out(files, tmp_path / "by hand"),
        check=True,
        capture_output=True,
    )
    files["README.txt"] += b"call +1 555 instead"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"README\.txt.*checksum"):
        unpack_kit(packed.getvalue())
    with pytest.raises(ValueError, match="start-up kit"):
        unpack_kit(b"not a zip")


def test_another_consortiums_kit_does_not_replace_the_root(
    office: Office, consortium: Path, tmp_path: Path
) -> None:
    other = provision(load_consortium(consortium), tmp_path / "other", NOW).office
    keys = install(kit(office, "north"), tmp_path / "north", NOW)
    with pytest.raises(ValueError, match="no other key"):
        install(kit(other, "north"), tmp_path / "north", NOW)
    request, fingerprint = request_certificate("north", tmp_path / "north")
    keyless = other.approve(request.read_bytes(), fingerprint, NOW)
    with pytest.raises(ValueError, match=r"another's\. Call the centre"):
        install(keyless, tmp_path / "north", NOW)
    with pytest.raises(CertificateRefused, match="another one signed"):
        install(other.folder / "sites" / "north" / "site.pem", tmp_path / "north", NOW)
    assert SiteKeys.open(keys.folder) == keys


BAD = {
    YAML.replace("name: hippocampus\n", ""): "lacks name",
    YAML + "surprise: 1\n": "no setting 'surprise'",
    YAML.replace(":8443", ""): "host:port",
    YAML.replace("- name: south", "- name: North"): "distinct sites",
    YAML.replace("- name: south", "- name: server"): "none called 'server'",
    YAML.replace("- name: south", "- name: ../south"): "1 to 63 letters",
    YAML.replace("2026-06-30", "soon"): "expires to be date",
    YAML.replace("key: site", "key: none"): "one of kit, site",
    YAML + "valid_days: 0\n": "valid_days",
    "name: [": "it is not YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_consortium_that_cannot_be_meant_is_refused(consortium: Path, text: str) -> None:
    consortium.write_text(text)
    with pytest.raises(ValueError, match=BAD[text]) as error:
        load_consortium(consortium)
    assert str(consortium) in str(error.value) and "\n" not in str(error.value)


def test_the_whole_way_typed(consortium: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    consortium.write_text(YAML.replace("    expires: 2026-06-30\n", ""))  # typed commands live today

    def centre(*typed: str) -> int:
        return server.cli.main([*typed, "--folder", str(tmp_path / "office")])

    def site(*typed: str) -> tuple[int, str]:
        screen = io.StringIO()
        return client.cli.main(typed, Console(file=screen, width=200)), screen.getvalue()

    assert centre("provision", str(consortium)) == 0
    fingerprint = open_office(tmp_path / "office").fingerprint
    assert fingerprint in capsys.readouterr().out
    into = str(tmp_path / "west")
    status, said = site("request", "west", "--into", into)
    assert status == 0
    request = str(tmp_path / "west" / "west.csr")
    assert centre("approve", request) == 2
    asked = said.splitlines()[1].strip()
    assert asked in capsys.readouterr().err
    assert centre("approve", request, "--fingerprint", asked) == 0
    status, said = site("install", str(tmp_path / "office" / "kits" / "west.zip"), "--into", into)
    assert status == 0 and fingerprint in said
    assert centre("renew", "west") == centre("renew", "server") == centre("revoke", "west") == 0
    assert centre("certificates") == 0 and "revoked" in capsys.readouterr().out
    assert site("install", str(tmp_path / "nothing.zip"))[0] == 2
    kinds = [e.record["kind"] for e in Journal(tmp_path / "office" / "journal.jsonl").entries()]
    assert kinds == ["authority", *["certificate"] * 6, "revocation"]


def _laid_out(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
