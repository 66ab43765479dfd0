"""Certificates of a consortium: one authority of its own, a certificate per machine, ECDSA P-384 throughout.

The authority signs the server's certificate (names and addresses it is reached by) and one client certificate
per site (its name in plans), which the reverse proxy asks for (mutual TLS). A site has one key pair, in two
encodings: PKCS #8 for TLS, OpenSSH for Flower's node authentication. One, not two, because then a signing
request carries everything the centre has to know, one fingerprint is compared over the telephone, the key
that Flower registers is the key of the certificate by construction, and revoking the site revokes both. The
two uses cannot be confused: TLS 1.3 signs under its own context string, Flower a bare time stamp.

Does not do: read or write files (`federation/keys/key_files.py`), keep books
(`server/consortium/provisioning.py`), or use any trust root but the consortium's own. Renewing keeps the key
and the authority; a new key needs a request.
"""

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from forms.names import SITE
from forms.ranges import brief

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

LOOPBACK = ("localhost", "127.0.0.1")
"""In every server certificate: behind the proxy, the centre's own processes talk over TLS on loopback."""
CLOCK_TOLERANCE = timedelta(hours=1)
"""Certificates begin to be valid this long before they are made: clocks of sites may be behind."""
_SITE_URI = "urn:fedmeduet:site:"
_CA_USAGE = {"key_cert_sign", "crl_sign"}
_LEAF_USAGE = {"digital_signature"}
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


_CHANGED = (
    ValueError, TypeError, OverflowError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""What the library raises for bytes that are not what they should be."""


class CertificateRefused(ValueError):
    """A certificate, key or request that is not what it should be; one line says why and what to do."""


@dataclass(frozen=True)
class Authority:
    """A consortium's trust root: its key signs, its certificate is what every machine trusts."""

    key: PrivateKey
    """Stays at the centre, on as few machines as possible."""
    certificate: x509.Certificate
    """Goes to every site, whose people compare its fingerprint over the telephone."""

    @staticmethod
    def create(consortium: str, days: int, now: datetime, key: PrivateKey | None = None) -> "Authority":
        """A new trust root for `consortium`, valid for `days`, with a new key where none is given. It may
        sign no other authority."""
        key = key or new_key()
        name = _common_name(checked_name(consortium))
        builder = _builder(name, key.public_key(), now, now + timedelta(days=days)).issuer_name(name)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(_CA_USAGE), critical=True)
        return Authority(key, builder.sign(key, SHA384()))

    def server(
        self, public_key: PublicKey, names: Sequence[str], not_after: datetime, now: datetime
    ) -> x509.Certificate:
        """The server's certificate, for every DNS name and IP address in `names`, and loopback."""
        reached_by = list(dict.fromkeys([*names, *LOOPBACK]))
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in reached_by])
        return self._leaf(
            reached_by[0], public_key, alternatives, ExtendedKeyUsageOID.SERVER_AUTH, not_after, now
        )

    def site(self, name: str, public_key: PublicKey, not_after: datetime, now: datetime) -> x509.Certificate:
        """The client certificate of site `name`."""
        alternatives = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(_SITE_URI + checked_name(name))]
        )
        return self._leaf(name, public_key, alternatives, ExtendedKeyUsageOID.CLIENT_AUTH, not_after, now)

    def revocation_list(
        self, revoked: Mapping[int, datetime], now: datetime
    ) -> x509.CertificateRevocationList:
        """The list of revoked serial numbers, each with when it was revoked.

        It is read from the centre's own disk and written anew with each revocation, so it lasts as long as
        the authority: a list that lapsed would lock every site out.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            .next_update(expiry(self.certificate))
        )
        for serial, when in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(entry)
        number = x509.CRLNumber(int(now.timestamp() * 1000))
        builder = builder.add_extension(number, critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return builder.add_extension(identifier, critical=False).sign(self.key, SHA384())

    def _leaf(
        self,
        subject: str,
        public_key: PublicKey,
        alternatives: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        not_after: datetime,
        now: datetime,
    ) -> x509.Certificate:
        last = expiry(self.certificate)
        if not now < not_after <= last:
            raise CertificateRefused(
                f"Expected the certificate of {subject!r} to end after now and not after its authority "
                f"({last:%Y-%m-%d}); got {not_after:%Y-%m-%d}."
            )
        builder = _builder(_common_name(subject), checked_key(public_key), now, not_after)
        builder = builder.issuer_name(self.certificate.subject)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(_LEAF_USAGE), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            (alternatives, False),
            (identifier, False),
        ):
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, SHA384())


@dataclass(frozen=True)
class SiteRequest:
    """A site asks for a certificate; its private key stays where it was made."""

    site: str
    public_key: PublicKey

    @property
    def fingerprint(self) -> str:
        """Of the key that asks: to be compared over the telephone before the request is approved."""
        return key_fingerprint(self.public_key)


def new_key() -> PrivateKey:
    """A new key on NIST P-384, from the system's secure random numbers."""
    return ec.generate_private_key(ec.SECP384R1())


def make_request(site: str, key: PrivateKey) -> x509.CertificateSigningRequest:
    """A signing request of site `site`, signed with its own key."""
    name = _common_name(checked_name(site))
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA384())


def read_request(pem: bytes) -> SiteRequest:
    """Who asks, and for which key. Only the name is taken from a request; everything else is the authority's.

    Raises `CertificateRefused` when it is not a request, not signed by its own key, or of another curve.
    """
    try:
        request = x509.load_pem_x509_csr(pem)
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key, signed = request.public_key(), request.is_signature_valid
    except _CHANGED as error:
        raise CertificateRefused(f"Expected a signing request in PEM; {brief(error)}.") from None
    if not signed or len(names) != 1:
        raise CertificateRefused("Expected a request with one name, signed with its own key; it is not.")
    return SiteRequest(checked_name(str(names[0].value)), checked_key(key))


def check_certificate(
    certificate: x509.Certificate, authority: x509.Certificate, role: str, now: datetime
) -> None:
    """Raise `CertificateRefused` unless `authority` signed `certificate` for `role` and it is valid `now`.

    `role`: `site`, or a name or address by which a server is reached. The library's verifier has the last
    word; what people meet most is said in words first.
    """
    begins, ends = certificate.not_valid_before_utc, expiry(certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_CHANGED, InvalidSignature):
        raise CertificateRefused(
            f"Expected a certificate signed by authority {fingerprint(authority)[:19]}…; another one signed "
            "it. Ask the centre which consortium it is for."
        ) from None
    if now < begins:
        raise CertificateRefused(
            f"Expected a certificate that is valid now ({now:%Y-%m-%d %H:%M} UTC); it begins "
            f"{begins:%Y-%m-%d %H:%M}. Is the clock of this machine right?"
        )
    if now > ends:
        raise CertificateRefused(
            f"Expected a certificate that is valid now; it ended {ends:%Y-%m-%d %H:%M} UTC. Ask the "
            "centre to renew it."
        )
    builder = PolicyBuilder().store(Store([authority])).time(now)
    try:
        if role == "site":
            site_of(certificate)
            builder.build_client_verifier().verify(certificate, [])
        else:
            builder.build_server_verifier(_general_name(role)).verify(certificate, [])
    except (VerificationError, *_CHANGED) as error:
        if isinstance(error, CertificateRefused):
            raise
        raise CertificateRefused(
            f"Expected a certificate for {role!r}; it is not one: {brief(error)}."
        ) from None


def site_of(certificate: x509.Certificate) -> str:
    """The site whose certificate it is; raises `CertificateRefused` when it is not a site's."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternatives = x509.SubjectAlternativeName([])
    names = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    if len(names) != 1 or not names[0].startswith(_SITE_URI):
        raise CertificateRefused("Expected the certificate of a site; it is another machine's.")
    return checked_name(names[0].removeprefix(_SITE_URI))


def expiry(certificate: x509.Certificate) -> datetime:
    """When it ends, UTC."""
    return certificate.not_valid_after_utc


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, 16 groups of four hex digits: to be read over the telephone."""
    return _grouped(certificate.fingerprint(SHA256()))


def key_fingerprint(key: PublicKey) -> str:
    """SHA-256 of a public key (its SubjectPublicKeyInfo), grouped as `fingerprint`."""
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return _grouped(hashlib.sha256(encoded).digest())


def same_fingerprint(said: str, computed: str) -> bool:
    """Whether what somebody typed or heard is the whole fingerprint; spaces, colons and case do not count."""
    return re.sub(r"[\s:-]", "", said).lower() == re.sub(r"[\s:-]", "", computed).lower()


def certificate_pem(certificate: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """PEM, as files hold it."""
    return certificate.public_bytes(Encoding.PEM)


def crl_pem(revocations: x509.CertificateRevocationList) -> bytes:
    """PEM, as the proxy reads it (`ssl_crl`)."""
    return revocations.public_bytes(Encoding.PEM)


def read_certificate(pem: bytes) -> x509.Certificate:
    """One certificate from PEM, all of whose parts can be read; raises `CertificateRefused`."""
    try:
        (certificate,) = x509.load_pem_x509_certificates(pem)
        # The library reads parts when they are asked for: a changed byte must show here, not later.
        for part in (certificate.version, certificate.serial_number, certificate.subject, certificate.issuer):
            str(part)
        list(certificate.extensions)
        certificate.public_key()
        expiry(certificate), certificate.not_valid_before_utc, certificate.signature_hash_algorithm
    except _CHANGED as error:
        raise CertificateRefused(f"Expected one certificate in PEM; {brief(error)}.") from None
    return certificate


def read_revocations(pem: bytes) -> x509.CertificateRevocationList:
    """A list of revoked certificates from PEM; raises `CertificateRefused`."""
    try:
        revocations = x509.load_pem_x509_crl(pem)
        for one in revocations:
            str(one.serial_number)
    except _CHANGED as error:
        raise CertificateRefused(f"Expected a list of revoked certificates in PEM; {brief(error)}.") from None
    return revocations


def key_pem(key: PrivateKey) -> bytes:
    """A private key in PKCS #8, as TLS software reads it; not encrypted: the file's mode protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(pem: bytes) -> PrivateKey:
    """A private key on P-384 from PKCS #8 or OpenSSH's format; raises `CertificateRefused`."""
    load = load_ssh_private_key if b"OPENSSH" in pem[:40] else load_pem_private_key
    try:
        key = load(pem, password=None)
    except _CHANGED as error:
        raise CertificateRefused(f"Expected a private key in PEM; {brief(error)}.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateRefused("Expected a key on NIST P-384; got one of another kind.")
    checked_key(key.public_key())
    return key


def node_key(key: PrivateKey) -> bytes:
    """The same private key as Flower reads it (`--auth-supernode-private-key`): OpenSSH's format."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def node_public_key(key: PublicKey) -> bytes:
    """A public key as Flower registers it (`flwr supernode register`): OpenSSH's format, one line."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def public_key_of(certificate: x509.Certificate) -> PublicKey:
    """The key that a certificate speaks for; raises `CertificateRefused` for another kind of key."""
    return checked_key(certificate.public_key())


def checked_key(key: object) -> PublicKey:
    """`key`, if it is a public key on NIST P-384; raises `CertificateRefused`."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise CertificateRefused("Expected a key on NIST P-384; got one of another kind.")
    return key


def checked_name(name: str) -> str:
    """`name`, if it can be a site's or a consortium's; raises `CertificateRefused`."""
    try:
        SITE.check(name, "a name")
    except ValueError as error:
        raise CertificateRefused(str(error)) from None
    return name


def utc_now() -> datetime:
    """The time, UTC, to the second: what certificates are written with."""
    return datetime.now(UTC).replace(microsecond=0)


def _builder(
    subject: x509.Name, key: PublicKey, now: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(not_after)
        .add_extension(identifier, critical=False)
    )


def _usage(usages: Iterable[str]) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in usages for name in _USAGES})


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _grouped(digest: bytes) -> str:
    text = digest.hex().upper()
    return " ".join(text[start : start + 4] for start in range(0, len(text), 4))
