"""Shares: a secret divided among sites; a threshold of them put it together, and fewer know nothing of it.

Shamir's scheme over GF(2^128), by pycryptodome; 32 bytes are two secrets of 16. A share travels encrypted
with AES-256-GCM under a key that two sites agree on.

Does not do: say how many are needed (`privacy/secure_sum/transcript.py`), or prove that a share is right:
what is put together is held against a hash or a public key.
"""

import os
from collections.abc import Mapping, Sequence

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from privacy.secure_sum.transcript import SumRefused

SHARE_BYTES = 32
_HALF = 16
_NONCE = 12


def split(secret: bytes, sites: Sequence[str], least: int) -> dict[str, bytes]:
    """A share of 32 bytes for each site, by its place among the sorted names; `least` of them are needed."""
    halves = [Shamir.split(least, len(sites), secret[i : i + _HALF], False) for i in (0, _HALF)]
    first, second = ([share for _, share in sorted(half)] for half in halves)
    return {site: first[i] + second[i] for i, site in enumerate(sorted(sites))}


def join(shares: Mapping[str, bytes], sites: Sequence[str]) -> bytes:
    """The secret from as many shares as are needed; `sites`: all among whom it was divided. Wrong shares give
    another secret, not an error."""
    places = {site: place for place, site in enumerate(sorted(sites), start=1)}
    return b"".join(
        Shamir.combine([(places[site], share[i : i + _HALF]) for site, share in shares.items()], False)
        for i in (0, _HALF)
    )


def seal(key: bytes, plain: bytes, context: bytes) -> bytes:
    """Encrypt a share for one site; nobody can move it to another context."""
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, context)


def unseal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Back from `seal`; raises `SumRefused` when the text was made under another key or for another context,
    or was changed."""
    try:
        return AESGCM(key).decrypt(text[:_NONCE], text[_NONCE:], context)
    except (InvalidTag, ValueError) as error:
        raise SumRefused("Expected shares that open; these do not.") from error
