"""The consortium's certificates: who may be whom, until when, under which root."""

import ssl
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_private_key, load_ssh_public_key
from cryptography.x509.oid import NameOID

from federation.keys.certificates import (
    Authority,
    CertificateRefused,
    certificate_pem,
    check_certificate,
    crl_pem,
    expiry,
    fingerprint,
    key_fingerprint,
    key_pem,
    make_request,
    new_key,
    node_key,
    node_public_key,
    public_key_of,
    read_certificate,
    read_key,
    read_request,
    same_fingerprint,
    site_of,
    utc_now,
)

NOW = utc_now()
YEAR = timedelta(days=365)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("hippocampus", 3650, NOW)


def issued(authority: Authority, site: str = "north") -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = new_key()
    return key, authority.site(site, key.public_key(), NOW + YEAR, NOW)


def test_a_sites_certificate_is_its_own_under_its_consortium_and_for_its_time(authority: Authority) -> None:
    _, certificate = issued(authority)
    assert site_of(certificate) == "north" and expiry(certificate) == NOW + YEAR
    check_certificate(certificate, authority.certificate, "site", NOW)
    check_certificate(certificate, authority.certificate, "site", NOW - timedelta(minutes=10))
    with pytest.raises(CertificateRefused, match=r"it ended .* renew"):
        check_certificate(certificate, authority.certificate, "site", NOW + YEAR + timedelta(seconds=1))
    with pytest.raises(CertificateRefused, match="clock"):
        check_certificate(certificate, authority.certificate, "site", NOW - timedelta(days=1))


def test_another_authority_of_the_same_name_is_another_authority(authority: Authority) -> None:
    _, certificate = issued(Authority.create("hippocampus", 3650, NOW))
    with pytest.raises(CertificateRefused, match="another one signed it"):
        check_certificate(certificate, authority.certificate, "site", NOW)


def test_a_site_cannot_pass_for_the_server_nor_the_server_for_a_site(authority: Authority) -> None:
    _, site = issued(authority)
    names = ("meduet.example.org", "10.0.0.7")
    server = authority.server(new_key().public_key(), names, NOW + YEAR, NOW)
    for name in (*names, "localhost", "127.0.0.1"):
        check_certificate(server, authority.certificate, name, NOW)
        with pytest.raises(CertificateRefused):
            check_certificate(site, authority.certificate, name, NOW)
    with pytest.raises(CertificateRefused):
        check_certificate(server, authority.certificate, "elsewhere.example.org", NOW)
    with pytest.raises(CertificateRefused, match="another machine's"):
        check_certificate(server, authority.certificate, "site", NOW)


def test_a_sites_certificate_cannot_sign_another(authority: Authority) -> None:
    key, certificate = issued(authority)
    forged = Authority(key, certificate).site("south", new_key().public_key(), NOW + YEAR, NOW)
    with pytest.raises(CertificateRefused):
        check_certificate(forged, authority.certificate, "site", NOW)
    with pytest.raises(CertificateRefused):
        check_certificate(forged, certificate, "site", NOW)


def test_no_certificate_outlives_its_authority(authority: Authority) -> None:
    with pytest.raises(CertificateRefused, match="not after its authority"):
        authority.site("north", new_key().public_key(), NOW + 11 * YEAR, NOW)


def test_a_request_carries_name_and_key_and_a_renewal_keeps_both(authority: Authority) -> None:
    key = new_key()
    request = read_request(certificate_pem(make_request("north", key)))
    assert (request.site, request.fingerprint) == ("north", key_fingerprint(key.public_key()))
    first = authority.site(request.site, request.public_key, NOW + YEAR, NOW)
    second = authority.site("north", public_key_of(first), NOW + 2 * YEAR, NOW + YEAR)
    assert key_fingerprint(public_key_of(second)) == request.fingerprint
    assert first.serial_number != second.serial_number
    check_certificate(second, authority.certificate, "site", NOW + YEAR + timedelta(days=1))


def test_requests_that_were_edited_or_are_of_another_kind_are_refused() -> None:
    pem = certificate_pem(make_request("north", new_key()))
    der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER))
    der[der.index(b"north")] = ord("N")
    edited = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    weak = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    other = x509.CertificateSigningRequestBuilder().subject_name(name).sign(weak, SHA256())
    outside = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "../north")])
    named = x509.CertificateSigningRequestBuilder().subject_name(outside).sign(new_key(), SHA256())
    for text, why in (
        (edited, "own key"),
        (certificate_pem(other), "P-384"),
        (certificate_pem(named), "Expected a name"),
        (b"nothing", "in PEM"),
    ):
        with pytest.raises(CertificateRefused, match=why):
            read_request(text)


def test_the_list_names_who_was_revoked_and_is_the_authoritys(authority: Authority) -> None:
    _, north = issued(authority)
    _, south = issued(authority, "south")
    revocations = authority.revocation_list({north.serial_number: NOW}, NOW)
    assert revocations.is_signature_valid(authority.key.public_key())
    assert revocations.get_revoked_certificate_by_serial_number(north.serial_number) is not None
    assert revocations.get_revoked_certificate_by_serial_number(south.serial_number) is None


def test_flower_reads_the_same_key_from_its_own_encoding() -> None:
    key = new_key()
    theirs = load_ssh_private_key(node_key(key), password=None)
    assert isinstance(theirs, ec.EllipticCurvePrivateKey)
    assert theirs.private_numbers() == key.private_numbers() == read_key(key_pem(key)).private_numbers()
    public = load_ssh_public_key(node_public_key(key.public_key()))
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.public_numbers() == key.public_key().public_numbers()


def test_a_fingerprint_is_read_aloud_in_groups_and_compared_whole(authority: Authority) -> None:
    text = fingerprint(authority.certificate)
    assert len(text.split()) == 16 and {len(group) for group in text.split()} == {4}
    assert same_fingerprint(text.lower().replace(" ", ":"), text)
    assert not same_fingerprint(text[:-1], text) and not same_fingerprint("", text)
    assert fingerprint(Authority.create("hippocampus", 10, NOW).certificate) != text


def test_python_and_openssl_speak_mutual_tls_with_them_and_refuse_the_revoked(
    authority: Authority, tmp_path: Path
) -> None:
    server_key = new_key()
    server = authority.server(server_key.public_key(), ["meduet.example.org"], NOW + YEAR, NOW)
    key, site = issued(authority)
    (tmp_path / "ca.pem").write_bytes(certificate_pem(authority.certificate))
    for name, certificate, own in (("server", server, server_key), ("site", site, key)):
        (tmp_path / f"{name}.pem").write_bytes(certificate_pem(certificate) + key_pem(own))
        assert read_certificate(certificate_pem(certificate)) == certificate

    def handshake(revoked: dict[int, object]) -> dict[str, object]:
        revocations = authority.revocation_list(revoked, NOW)  # type: ignore[arg-type]
        (tmp_path / "crl.pem").write_bytes(crl_pem(revocations))
        inside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.pem"))
        inside.load_cert_chain(tmp_path / "server.pem")
        inside.load_verify_locations(tmp_path / "crl.pem")
        inside.verify_mode = ssl.CERT_REQUIRED
        inside.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        outside = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        outside.load_cert_chain(tmp_path / "site.pem")
        ways = ssl.MemoryBIO(), ssl.MemoryBIO()
        near = outside.wrap_bio(ways[0], ways[1], server_hostname="meduet.example.org")
        far = inside.wrap_bio(ways[1], ways[0], server_side=True)
        for _ in range(4):
            for end in (near, far):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        return dict(far.getpeercert() or {})

    assert ("URI", "urn:fedmeduet:site:north") in handshake({})["subjectAltName"]  # type: ignore[operator]
    with pytest.raises(ssl.SSLError, match="revoked"):
        handshake({site.serial_number: NOW})
