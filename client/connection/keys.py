"""The keys of a site: made here or taken from a kit, checked against the authority, and read when it starts.

They lie in one folder (`keys_dir` of site.yaml), mode 0700: `site.key` and `node.key` (the same private key,
for TLS and as Flower reads it), `site.pem` (the certificate), `ca.pem` (the consortium's authority),
`connection.yaml` (where the centre is). Does not do: connect, or decide whether an authority is to be
trusted: people compare its fingerprint, once.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from federation.keys.certificates import (
    certificate_pem,
    check_certificate,
    checked_name,
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
    site_of,
)
from federation.keys.identity import SiteIdentity
from federation.keys.key_files import key_folder, read_file, refuse_work_tree
from federation.keys.kits import AUTHORITY, CERTIFICATE, CONNECTION, KEY, SETTINGS, Connection, unpack_kit
from storage.files import PUBLIC, write_whole

KEYS = "keys"
"""Folder of the keys, beside site.yaml."""
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"


@dataclass(frozen=True)
class SiteKeys:
    """What a site needs to connect, read and found to belong together."""

    folder: Path
    connection: Connection
    authority: x509.Certificate
    certificate: x509.Certificate

    @staticmethod
    def open(folder: Path) -> "SiteKeys":
        """Read the keys in `folder`.

        Raises `ValueError` naming what is missing or does not belong to the rest. Time is not looked at: see
        `check`.
        """
        connection = Connection.from_yaml(read_file(folder / CONNECTION, "the centre's address"))
        authority = read_certificate(read_file(folder / AUTHORITY, "the authority's certificate"))
        certificate = read_certificate(read_file(folder / CERTIFICATE, "the site's certificate"))
        key = read_key(read_file(folder / KEY, "the site's private key"))
        if public_key_of(certificate) != key.public_key():
            raise ValueError(f"Expected {folder / CERTIFICATE} to be for the key {KEY}; it is for another.")
        if site_of(certificate) != connection.site:
            raise ValueError(
                f"Expected a certificate of {connection.site!r}; got {site_of(certificate)!r}'s."
            )
        if read_key(read_file(folder / NODE_KEY, "the key for Flower")).public_key() != key.public_key():
            raise ValueError(f"Expected {folder / NODE_KEY} to be {KEY} in Flower's format; it is another.")
        return SiteKeys(folder, connection, authority, certificate)

    @staticmethod
    def read_identity(folder: Path | None) -> SiteIdentity:
        """The keys in `folder` (`keys_dir` of site.yaml), to sign with. Raises `ValueError`."""
        if folder is None:
            raise ValueError(
                "Expected keys of this site (site.yaml: keys_dir); in a secure sum sites sign what they tell "
                "each other. Install the start-up kit: meduet-site install."
            )
        keys = SiteKeys.open(folder)
        key = read_key(read_file(folder / KEY, "the site's private key"))
        return SiteIdentity(key, keys.certificate, keys.authority)

    def check(self, now: datetime) -> datetime:
        """When the certificate ends; raises `CertificateRefused` unless it is valid under its authority."""
        check_certificate(self.certificate, self.authority, "site", now)
        return expiry(self.certificate)

    @property
    def authority_fingerprint(self) -> str:
        """For the telephone."""
        return fingerprint(self.authority)


def request_certificate(site: str, into: Path) -> tuple[Path, str]:
    """Make a key pair in `into`, which stays there, and a signing request; returns its file and fingerprint.

    Asked again, the same key asks again. Raises `ValueError` when `into` is in a git work tree.
    """
    refuse_work_tree(into)
    folder = key_folder(into / KEYS)
    path = folder / KEY
    key = read_key(read_file(path, "the site's private key")) if path.exists() else new_key()
    if not path.exists():
        write_whole(path, key_pem(key))
    request = into / f"{checked_name(site)}.csr"
    write_whole(request, certificate_pem(make_request(site, key)), PUBLIC)
    return request, key_fingerprint(key.public_key())


def install(source: Path, into: Path, now: datetime) -> SiteKeys:
    """Install a start-up kit, or the certificate of a renewal, into `into`; again changes nothing.

    Everything is checked before anything is written: checksums, chain, name, and that certificate and private
    key belong together. site.yaml is written only where there is none. Raises `ValueError`.
    """
    refuse_work_tree(into)
    content = read_file(source, "a start-up kit or a certificate")
    if content.startswith(b"-----BEGIN CERTIFICATE"):
        return _install_certificate(content, into, now)
    files = unpack_kit(content)
    connection = Connection.from_yaml(files[CONNECTION])
    folder = into / KEYS
    own = read_file(folder / KEY, "the site's private key") if (folder / KEY).exists() else None
    if KEY not in files and own is None:
        raise ValueError(
            f"Expected the private key in {folder}; the kit holds none. Install into the folder in which "
            f"`meduet-site request {connection.site}` made it."
        )
    key = read_key(own if own is not None else files[KEY])
    if own is not None and KEY in files and read_key(files[KEY]).public_key() != key.public_key():
        raise ValueError(
            f"Expected no other key in {folder}; it holds one, and the kit another. To change keys, move the "
            "folder away first."
        )
    authority, certificate = read_certificate(files[AUTHORITY]), read_certificate(files[CERTIFICATE])
    _same_authority(folder, authority)
    check_certificate(certificate, authority, "site", now)
    if site_of(certificate) != connection.site or public_key_of(certificate) != key.public_key():
        raise ValueError("Expected a kit whose certificate is for its site and key; it is for another.")
    key_folder(folder)
    write_whole(folder / KEY, key_pem(key))
    write_whole(folder / NODE_KEY, node_key(key))
    write_whole(folder / NODE_PUBLIC_KEY, node_public_key(key.public_key()), PUBLIC)
    for name in (AUTHORITY, CERTIFICATE, CONNECTION):
        write_whole(folder / name, files[name], PUBLIC)
    if not (into / SETTINGS).exists():
        write_whole(into / SETTINGS, files[SETTINGS], PUBLIC)
    return SiteKeys.open(folder)


def _install_certificate(content: bytes, into: Path, now: datetime) -> SiteKeys:
    folder = into / KEYS
    keys = SiteKeys.open(folder)
    certificate = read_certificate(content)
    check_certificate(certificate, keys.authority, "site", now)
    if site_of(certificate) != keys.connection.site:
        raise ValueError(
            f"Expected a certificate of {keys.connection.site!r}; got {site_of(certificate)!r}'s. Ask the "
            "centre."
        )
    if public_key_of(certificate) != public_key_of(keys.certificate):
        raise ValueError(
            f"Expected a certificate for the key in {folder}; it is for another. Ask the centre."
        )
    write_whole(folder / CERTIFICATE, certificate_pem(certificate), PUBLIC)
    return SiteKeys.open(folder)


def _same_authority(folder: Path, authority: x509.Certificate) -> None:
    path = folder / AUTHORITY
    if path.exists() and read_certificate(path.read_bytes()) != authority:
        raise ValueError(
            f"Expected the authority that is installed in {folder}; the kit is another's. Call the centre "
            "before you do anything else; to join another consortium, install into another folder."
        )
