"""The secret source: noise that nobody else can draw again, and that its owner draws again in the same bits.

A key is 32 bytes of the operating system's randomness in a file of its own (0600). Each purpose has a stream
of its own: ChaCha20 (RFC 8439) under a key that HKDF-SHA256 (RFC 5869) derives from words. A process that was
killed finds the key and draws the same numbers; no seed of a plan and no generator of PyTorch reaches them.
Normals are by Box and Muller in float64, from uniforms of 53 bits; four are added and halved, against attacks
on the low bits of a single one (arXiv:2112.05307, as in Opacus).

Does not do: decide how much noise (`privacy/accounting.py`), or be fast enough for more than some millions of
numbers.
"""

import math
import secrets
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jaxtyping import Float64
from torch import Tensor

from storage.files import write_once

KEY_BYTES = 32
_NONCE = bytes(16)  # each stream has a key of its own, so the nonce need not differ
_SUMMED = 4


class SecretSource:
    """Streams of random numbers under one secret key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {KEY_BYTES} bytes; got {len(key)}.")
        self.key = key

    @staticmethod
    def at(path: Path) -> "SecretSource":
        """The source whose key is in this file, made when it is first needed, for its owner only.

        A file of another size was cut by a kill before anything was drawn, or spoiled: it is made anew. Then
        the noise is another, which the ledger lets out only where none has left.
        """
        if path.is_file() and path.stat().st_size != KEY_BYTES:
            path.unlink()
        try:
            write_once(path, secrets.token_bytes(KEY_BYTES))
        except FileExistsError:
            pass
        return SecretSource(path.read_bytes())

    def stream(self, *words: object) -> "Stream":
        """The stream of these words: always the same, and unlike that of any others."""
        info = b"".join(_counted(str(word).encode()) for word in ("fedmeduet", *words))
        return Stream(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self.key))


class Stream:
    """Numbers of one purpose, in order: what is drawn once is not drawn again from this object."""

    def __init__(self, key: bytes) -> None:
        self._keystream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()

    def uniforms(self, count: int) -> Float64[np.ndarray, " count"]:
        """Multiples of 2^-53 from 0 (included) to 1 (not)."""
        words = np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, shape: tuple[int, ...]) -> Float64[Tensor, "..."]:
        """Standard normal numbers; none is beyond 17.2, which has a chance below 1e-60."""
        count = math.prod(shape)
        drawn = self.uniforms(_SUMMED * count).reshape(2, _SUMMED // 2, count)
        radius = np.sqrt(-2.0 * np.log(drawn[0] + 2.0**-53))  # of a uniform above 0
        angle = 2.0 * np.pi * drawn[1]
        pairs = radius * np.stack([np.cos(angle), np.sin(angle)])
        return torch.from_numpy(pairs.sum(axis=(0, 1)) / math.sqrt(_SUMMED)).reshape(shape)


def _counted(word: bytes) -> bytes:
    """With its length before it, so that no two lists of words are the same bytes."""
    return len(word).to_bytes(4, "big") + word
