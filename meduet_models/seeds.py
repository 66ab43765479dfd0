"""Seeds from words: every stream of random numbers has its own, by a stable hash of what it is for.

The same words (a purpose, the run's seed, a step, ...) give the same numbers on every machine, in any order
of calls, and other words give a stream that never meets it; nobody touches a global generator.

Does not do: keep anything secret (whoever knows the words knows the draws; a site's batches and folds are
drawn under its own key, `client/secrets/site_secret.py`), or draw.
"""

import hashlib

import torch


def digest_of(*words: object, separator: str = " ") -> bytes:
    """32 bytes that follow from these words alone; a name of a file that is no UTF-8 is a word, too."""
    text = separator.join(map(str, words))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()


def seed_in(digest: bytes) -> int:
    """The seed that a digest begins with, 0 to 2^63 - 1: every generator takes it."""
    return int.from_bytes(digest[:8], "big") >> 1


def seed_of(*words: object) -> int:
    """A seed for these words, 0 to 2^63 - 1."""
    return seed_in(digest_of(*words))


def generator_of(*words: object) -> torch.Generator:
    """A CPU generator for these words."""
    return torch.Generator().manual_seed(seed_of(*words))
