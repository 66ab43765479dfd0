"""Who says that a file of weights is theirs: a signature beside it, by the key of a consortium.

`model.safetensors.sig` holds the hash of the file, an ECDSA signature over it, and the certificate of the
consortium's authority, whose fingerprint people compare over the telephone, as sites do. By itself it shows
that nobody changed the file since it was signed; with the certificate that somebody trusts (`trusted`), by
whom. What this file does not do: hold a private key (`server/consortium/signing.py`), or make an unsigned
file wrong: it is said to be unsigned.
"""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.x509.oid import NameOID

from forms.form import build
from forms.json_text import canonical, read_json
from meduet_models.weights import sha256_of_file

SUFFIX = ".sig"
_LONGEST = 100_000  # bytes of a signature's file
_CONTEXT = b"FedMeDUET signed file, version 1\0"
_CHANGED = (ValueError, TypeError, binascii.Error, UnsupportedAlgorithm, x509.InvalidVersion)


@dataclass(frozen=True)
class Signature:
    """Who signed a file."""

    consortium: str
    """The name in the authority's certificate."""
    fingerprint: str
    """SHA-256 of that certificate, 64 hex digits in groups of four."""


@dataclass(frozen=True, kw_only=True)
class _Signed:
    """What a signature's file says."""

    sha256: str
    signature: str
    """Base64 of the DER form."""
    certificate: str
    """PEM."""


def signed_message(sha256: str) -> bytes:
    """The bytes that are signed: no certificate and no list of revoked ones can begin like them."""
    return _CONTEXT + sha256.encode("ascii")


def signature_text(sha256: str, signature: bytes, certificate: x509.Certificate) -> str:
    """What the file beside the signed one holds."""
    from cryptography.hazmat.primitives.serialization import Encoding

    pem = certificate.public_bytes(Encoding.PEM).decode("ascii")
    record = {"sha256": sha256, "signature": base64.b64encode(signature).decode("ascii"), "certificate": pem}
    return canonical(record) + "\n"


def check_signature(path: Path, trusted: Path | None = None) -> Signature | None:
    """Who signed the file at `path`; None: nobody.

    Raises `ValueError` when the file is not as it was signed, and, with `trusted` (the authority's
    certificate in PEM), when it is unsigned or signed by another.
    """
    beside = path.with_name(path.name + SUFFIX)
    if not beside.is_file():
        if trusted is not None:
            raise ValueError(f"Expected {path.name} signed by the consortium of {trusted}; it is not signed.")
        return None
    with beside.open("rb") as file:
        text = file.read(_LONGEST).decode("utf-8", "replace")
    signed = build(_Signed, read_json(text, f"the signature in {beside.name}"), beside.name)
    changed = f"Expected {path.name} as it was signed; it, or {beside.name}, has changed. Get both again."
    try:
        certificate = x509.load_pem_x509_certificate(signed.certificate.encode("ascii"))
        key, name = certificate.public_key(), certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if not isinstance(key, ec.EllipticCurvePublicKey) or len(name) != 1:
            raise ValueError(changed)
        made = base64.b64decode(signed.signature, validate=True)
        key.verify(made, signed_message(sha256_of_file(path)), ec.ECDSA(SHA384()))
    except (*_CHANGED, InvalidSignature):
        raise ValueError(changed) from None
    digest = certificate.fingerprint(SHA256())
    if trusted is not None and _trusted(trusted).fingerprint(SHA256()) != digest:
        raise ValueError(f"Expected {path.name} signed by the consortium of {trusted}; another signed it.")
    text = digest.hex().upper()
    groups = " ".join(text[start : start + 4] for start in range(0, len(text), 4))
    return Signature(str(name[0].value), groups)


def _trusted(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, *_CHANGED):
        raise ValueError(f"Expected the authority's certificate (ca.pem) at {path}; it is not one.") from None
