"""Masks: a stream of pseudorandom ring elements that two sites can compute, and nobody else.

Two sites agree on a key (X25519, RFC 7748; then HKDF-SHA256, RFC 5869, bound to plan, round, attempt and the
pair), and the key gives a stream (ChaCha20, RFC 8439) of as many 32-bit numbers as the vector has values. One
of them adds it, the other subtracts it: in the sum it is gone. A key is used for one stream only, so that a
nonce of zeros is no repetition.

Does not do: say who may learn a key (`privacy/secure_sum/party.py`).
Source: Bonawitz et al., Practical Secure Aggregation (2017), section 4.
"""

import os

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.secure_sum.ring import Ring
from privacy.secure_sum.transcript import Attempt, SumRefused

KEY_BYTES = 32
_BLOCK = 1 << 18  # bytes of a stream at once
_ZEROS = bytes(_BLOCK)


def new_secret() -> bytes:
    """32 random bytes: a private X25519 key, or the seed of a mask."""
    return os.urandom(KEY_BYTES)


def public_key(secret: bytes) -> bytes:
    """The public half of a private X25519 key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed_key(secret: bytes, peer: bytes, attempt: Attempt, purpose: str, one: str, other: str) -> bytes:
    """The key that two sites agree on for one purpose; `one` and `other` name them, in the same order on both
    sides. Raises `SumRefused` for a public key with which nothing can be agreed."""
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise SumRefused("Expected a public X25519 key; got bytes that are none.") from error
    return _derived(shared, attempt, purpose, one, other)


def seed_key(seed: bytes, attempt: Attempt, site: str) -> bytes:
    """The key of the mask that a site adds by itself."""
    return _derived(seed, attempt, "self mask", site)


def pair_sign(site: str, peer: str) -> int:
    """Whether `site` adds (1) or subtracts (-1) the mask that it shares with `peer`."""
    return 1 if site < peer else -1


def pair_key(secret: bytes, site: str, public: bytes, peer: str, attempt: Attempt) -> bytes:
    """The key of the mask that two sites share, the same on both sides."""
    one, other = sorted((site, peer))
    return agreed_key(secret, public, attempt, "pair mask", one, other)


def add_mask(vector: Ring, key: bytes, sign: int) -> None:
    """Add (1) or subtract (-1) the stream of `key`, in place."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    scratch = bytearray(_BLOCK)
    numbers = np.frombuffer(scratch, dtype="<u4")
    add = np.add if sign > 0 else np.subtract
    for start in range(0, len(vector), len(numbers)):
        block = vector[start : start + len(numbers)]
        stream.update_into(_ZEROS, scratch)
        add(block, numbers[: len(block)], out=block)


def _derived(material: bytes, attempt: Attempt, *words: str) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=attempt.context(*words)).derive(material)
