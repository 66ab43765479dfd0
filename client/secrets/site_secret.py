"""The secrets of a site: random bytes in files of its own, made once, and the seeds that follow from them.

Which patients are in which batch, and who is in which fold, is drawn from a secret, not from the plan's seed:
who sends the weights and knows the batches could read a batch off the answer. The same secret draws the same
again, so a site replays its own steps to the bit. Does not do: leave the site, encrypt anything.
"""

import hashlib
import hmac
import secrets
from pathlib import Path

from meduet_models.seeds import seed_in
from storage.files import write_once

DRAWS = "draws.key"
"""The file of the secret from which batches and folds are drawn, in the state folder."""
_BYTES = 32


def site_secret(path: Path) -> bytes:
    """The secret in this file, made when it is first needed, for its owner only.

    Raises `ValueError` when the file holds another number of bytes.
    """
    secret = secrets.token_bytes(_BYTES)
    try:
        write_once(path, secret)
    except FileExistsError:
        secret = path.read_bytes()
        if len(secret) != _BYTES:
            raise ValueError(f"Expected {_BYTES} bytes in {path}; got {len(secret)}. Restore it.") from None
    return secret


def digest_of(secret: bytes, *words: object) -> bytes:
    """32 bytes that follow from the secret and these words, and tell nothing of it."""
    return hmac.new(secret, "\0".join(map(str, words)).encode(), hashlib.sha256).digest()


def seed_of(secret: bytes, *words: object) -> int:
    """A seed from 0 to 2^63 - 1, in the same way."""
    return seed_in(digest_of(secret, *words))
