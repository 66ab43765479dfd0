"""Sealed to a recipient: what a site sends so that only the holder of one key reads it, no server on the way.

HPKE (RFC 9180) with X25519, HKDF-SHA256 and AES-256-GCM: a fresh key for each message. What a message belongs
to (plan, site, round, names) is bound into the key, so that it opens nowhere else. Does not do: say who
sealed it (that is the transport's: `strategies/reply_wall.py`), or hide how long it is.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

OVERHEAD_BYTES = 32 + 16
"""By how much a sealed message is longer: the fresh public key, and the tag."""
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class SealBroken(ValueError):
    """What was sealed does not open: another key, another purpose, or bytes that were changed."""


def seal(clear: bytes, recipient: str, purpose: bytes) -> bytes:
    """Seal `clear` to a public key (64 hex digits), for this purpose alone.

    Raises `ValueError` for a key that is none: with it, anybody could read.
    """
    return _SUITE.encrypt(clear, _public(recipient), info=purpose)


def unseal(sealed: bytes, key: X25519PrivateKey, purpose: bytes) -> bytes:
    """The inverse of `seal`. Raises `SealBroken`."""
    try:
        return _SUITE.decrypt(sealed, key, info=purpose)
    except InvalidTag:
        raise SealBroken("Expected what was sealed to this key for this purpose; it does not open.") from None


def check_recipient(recipient: str) -> None:
    """Raise `ValueError` unless something can be sealed to this key."""
    seal(b"", recipient, b"")


def recipient_key(secret: bytes) -> X25519PrivateKey:
    """The private key that follows from a secret of 32 bytes, and tells nothing of it."""
    derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"fedmeduet latents, recipient")
    return X25519PrivateKey.from_private_bytes(derived.derive(secret))


def recipient_of(key: X25519PrivateKey) -> str:
    """Its public key, as a plan names it."""
    return key.public_key().public_bytes_raw().hex()


def _public(recipient: str) -> X25519PublicKey:
    try:
        public = X25519PublicKey.from_public_bytes(bytes.fromhex(recipient))
        _SUITE.encrypt(b"", public)  # a point of low order, to which nothing can be sealed, raises here
    except ValueError:
        raise ValueError(
            f"Expected diffusion.recipient to be the public key of a latent bank, 64 hex digits; got "
            f"{recipient[:12] or 'none'!r}. The centre makes it: meduet-server plan --bank-key FILE."
        ) from None
    return public
