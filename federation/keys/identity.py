"""A site's identity among the others: it signs with the key of its certificate, and reads who signed.

One key, P-384, as for TLS; its certificate says which site it is, and the consortium's authority signed that.
What is signed begins with words that no other use of the key signs. Whoever holds the authority's key could
certify a key of its own for a site's name: sites that have met keep each other's key in mind (`Peers`).

Does not do: encrypt, or know what is signed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from federation.keys.certificates import (
    CertificateRefused,
    PrivateKey,
    certificate_pem,
    check_certificate,
    key_fingerprint,
    public_key_of,
    read_certificate,
    site_of,
)
from forms.json_text import read_json
from storage.files import write_whole

_SIGNED = b"fedmeduet signature\0"
_ALGORITHM = ec.ECDSA(SHA384(), deterministic_signing=True)  # RFC 6979: the same text is signed the same


@dataclass(frozen=True)
class SiteIdentity:
    """The key of a site, its certificate, and the authority that all trust."""

    key: PrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate

    def sign(self, text: bytes) -> bytes:
        """A signature of this site; of the same text always the same."""
        return self.key.sign(_SIGNED + text, _ALGORITHM)

    def certificate_text(self) -> str:
        """The certificate as it travels, PEM."""
        return certificate_pem(self.certificate).decode("ascii")

    def key_of(self, site: str, certificate: str, signature: bytes, text: bytes, now: datetime) -> str:
        """As `signing_key`, by the authority that this site trusts."""
        return signing_key(self.authority, site, certificate, signature, text, now)


def signing_key(
    authority: x509.Certificate, site: str, certificate: str, signature: bytes, text: bytes, now: datetime
) -> str:
    """Fingerprint of the key with which `site` signed `text`.

    Raises `CertificateRefused` unless the authority certified that key for that site and the signature is
    right.
    """
    found = read_certificate(certificate.encode())
    check_certificate(found, authority, "site", now)
    if site_of(found) != site:
        raise CertificateRefused(f"Expected a certificate of {site!r}; got {site_of(found)!r}'s.")
    key = public_key_of(found)
    try:
        key.verify(signature, _SIGNED + text, ec.ECDSA(SHA384()))
    except InvalidSignature:
        raise CertificateRefused(f"Expected a signature of {site!r}; it is not one.") from None
    return key_fingerprint(key)


class Peers:
    """The keys of other sites as this site first saw them, in one file.

    A site whose key is another than before is refused until people have compared the new fingerprint over the
    telephone and removed its line from the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def met(self, fingerprints: Mapping[str, str]) -> None:
        """Keep the keys of sites that are new; raises `CertificateRefused` where one is another than before,
        and `ValueError` when the file is damaged."""
        known: dict[str, str] = {}
        if self._path.is_file():
            known = read_json(self._path.read_text(encoding="utf-8"), f"keys of sites in {self._path}")
            if not isinstance(known, dict):
                raise ValueError(f"Expected keys of sites in {self._path}; got something else.")
        for site, fingerprint in fingerprints.items():
            if known.get(site, fingerprint) != fingerprint:
                raise CertificateRefused(
                    f"Expected the key of {site!r} that was seen before; got {fingerprint}. Compare it with "
                    f"that hospital over the telephone; if it is theirs, remove {site!r} from {self._path}."
                )
        if new := {site: one for site, one in fingerprints.items() if site not in known}:
            write_whole(self._path, json.dumps(known | new, indent=1, sort_keys=True) + "\n")
