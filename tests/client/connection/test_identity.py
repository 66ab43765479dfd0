"""What a site signs with: the key of its certificate, from the folder of its keys."""

from datetime import timedelta
from pathlib import Path

import pytest

from client.connection.keys import SiteKeys
from federation.keys.certificates import (
    Authority,
    CertificateRefused,
    certificate_pem,
    key_pem,
    new_key,
    node_key,
    utc_now,
)
from federation.keys.identity import SiteIdentity
from federation.keys.kits import AUTHORITY, CERTIFICATE, CONNECTION, KEY, Connection
from simulations.consortium import simulated_identity


def installed(folder: Path, authority: Authority, site: str, days: int = 30) -> Path:
    key, now = new_key(), utc_now()
    certificate = authority.site(site, key.public_key(), now + timedelta(days=days), now)
    folder.mkdir()
    connection = Connection(site=site, consortium="trial", server="centre.example:443")
    for name, content in (
        (KEY, key_pem(key)),
        ("node.key", node_key(key)),
        (CERTIFICATE, certificate_pem(certificate)),
        (AUTHORITY, certificate_pem(authority.certificate)),
        (CONNECTION, connection.to_yaml()),
    ):
        (folder / name).write_bytes(content)
    return folder


def test_what_an_installed_site_signs_another_of_its_consortium_reads(tmp_path: Path) -> None:
    authority = Authority.create("trial", 60, utc_now())
    oslo, lyon = (SiteKeys.read_identity(installed(tmp_path / s, authority, s)) for s in ("oslo", "lyon"))
    signature, certificate = oslo.sign(b"keys"), oslo.certificate_text()
    assert oslo.sign(b"keys") == signature
    now = utc_now()
    found = lyon.key_of("oslo", certificate, signature, b"keys", now)
    assert len(found.replace(" ", "")) == 64
    for site, by, text, when, why in (
        ("oslo", oslo, b"other keys", now, "signature of 'oslo'"),
        ("lyon", oslo, b"keys", now, "certificate of 'lyon'"),
        ("oslo", lyon, b"keys", now, "certificate of 'oslo'"),
        ("oslo", oslo, b"keys", now + timedelta(days=40), "it ended"),
        ("oslo", simulated_identity("oslo"), b"keys", now, "another one signed"),
    ):
        signed: SiteIdentity = by
        with pytest.raises(CertificateRefused, match=why):
            lyon.key_of(site, signed.certificate_text(), signature, text, when)


def test_a_site_without_keys_is_told_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meduet-site install"):
        SiteKeys.read_identity(None)
    with pytest.raises(ValueError, match="centre's address"):
        SiteKeys.read_identity(tmp_path)
