"""The key of an encrypted cache: made here, kept wrapped in the cache's folder, changed on request.

`cache.key` holds the key that the cache's files are sealed under, itself sealed under what opens it: a file
of 32 random bytes (site.yaml: cache_key_file; on another disk, or a token), or a passphrase, by scrypt.
Another key is a `rotate`: while files are sealed anew, one by one, both keys lie in `cache.key`, so that a
rotation that was killed at any point goes on; what opens the cache is changed by `rewrap`, which is one
write. Does not do: read or write encodings (`cache_files.py`), or remember a passphrase: who starts a process
gives it in the environment, which its own account alone can read.
Source: scrypt, RFC 7914; parameters of OWASP's list.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from client.latents.cache_files import SealedFiles
from client.latents.encoding import FINGERPRINTS
from federation.keys.key_files import read_file
from forms.json_text import canonical, read_json
from storage.files import private_folder, write_once, write_whole
from storage.sealed_files import (
    KEY_BYTES,
    LONGEST_HEAD,
    DamagedSeal,
    SealingKeys,
    key_number,
    open_sealed,
    sealed_under,
    write_sealed,
)

FILE = "cache.key"
PASSPHRASE = "MEDUET_CACHE_PASSPHRASE"
"""Environment variable of the passphrase, where no key file opens the cache."""
SHORTEST_PASSPHRASE = 12
_SCRYPT = {"n": 2**17, "r": 8, "p": 1}
_NONCE_BYTES = 12
_SALT_BYTES = 16
_FIELDS = frozenset({"form", "opened_by", "salt", "nonce", "sealed"})
_MOST_KEYS = 2
_CUT_OFF_S = 3600.0


@dataclass(frozen=True)
class Opener:
    """What opens `cache.key`: a key file, or a passphrase."""

    key_file: Path | None
    passphrase: str = field(default="", repr=False)

    @property
    def kind(self) -> str:
        """As `cache.key` says it."""
        return "passphrase" if self.key_file is None else "key file"

    def check(self) -> None:
        """Raise `ValueError` unless this may open a new key."""
        if self.key_file is None and len(self.passphrase) < SHORTEST_PASSPHRASE:
            raise ValueError(
                f"Expected a passphrase of at least {SHORTEST_PASSPHRASE} characters; got "
                f"{len(self.passphrase)}."
            )

    def wrapping_key(self, salt: bytes, new: bool = False) -> bytes:
        """The key that the cache's key is sealed under; with `new`, a key file that is not there is made."""
        if self.key_file is None:
            return Scrypt(salt=salt, length=KEY_BYTES, **_SCRYPT).derive(self.passphrase.encode())
        if new and not self.key_file.exists():
            write_once(self.key_file, secrets.token_bytes(KEY_BYTES))
        key = read_file(self.key_file, "the cache's key file (site.yaml: cache_key_file)")
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected {KEY_BYTES} bytes of key in {self.key_file}; got {len(key)}.")
        return key


def opener(key_file: Path | None) -> Opener:
    """What opens a site's cache: its key file, or the passphrase in the environment. Raises `ValueError`
    where neither is."""
    if key_file is not None:
        return Opener(key_file)
    if not (passphrase := os.environ.get(PASSPHRASE, "")):
        raise ValueError(
            f"Expected the passphrase of the encrypted cache in {PASSPHRASE}; it is not set. Set it, or name "
            "a key file in site.yaml: cache_key_file."
        )
    return Opener(None, passphrase)


def cache_keys(folder: Path, opened_by: Opener) -> SealingKeys:
    """The keys of the cache in `folder`; a new key for a new cache.

    Raises `ValueError` when they do not open, or are lost while files are sealed under them.
    """
    if (folder / FILE).exists():
        return _unwrapped(folder, opened_by)
    if any(sealed_under(path) for path in _files(folder)):
        raise ValueError(
            f"Expected the key of the encrypted cache at {folder / FILE}; it is not there. Restore it, or "
            "remove the cache's folder: the scans are encoded again."
        )
    opened_by.check()
    keys = SealingKeys(secrets.token_bytes(KEY_BYTES))
    private_folder(folder)
    _wrap(folder, keys, opened_by)
    return keys


def sealed_files(folder: Path, opened_by: Opener) -> SealedFiles:
    """The files of the encrypted cache in `folder`, none of them in clear. Raises as `cache_keys`."""
    keys = cache_keys(folder, opened_by)
    seal_all(folder, keys)
    return SealedFiles(keys)


def rotate(folder: Path, opened_by: Opener) -> int:
    """Seal every file of the cache under a new key, and forget the old one; how many were sealed anew.

    Killed anywhere and begun again, it goes on with the key that it began with. Raises as `cache_keys`.
    """
    keys = cache_keys(folder, opened_by)
    if not keys.earlier:
        keys = SealingKeys(secrets.token_bytes(KEY_BYTES), (keys.current,))
        _wrap(folder, keys, opened_by)
    count = seal_all(folder, keys)
    _wrap(folder, SealingKeys(keys.current), opened_by)
    return count


def rewrap(folder: Path, opened_by: Opener, new: Opener) -> None:
    """From now on `new` opens the cache's key, and nothing else does. Raises as `cache_keys`."""
    new.check()
    _wrap(folder, cache_keys(folder, opened_by), new)


def seal_all(folder: Path, keys: SealingKeys) -> int:
    """Seal what lies in the cache in clear, or under an earlier key; what does not open is removed, and made
    again when it is needed. How many were sealed."""
    _remove_cut_off(folder)
    number = key_number(keys.current)
    others = [path for path in _files(folder) if sealed_under(path) != number]
    for path in others:
        if sealed_under(path) is None:
            _seal(path, keys)
            continue
        try:
            file = open_sealed(path, keys)
            write_sealed(path, file.head, [bytes(file.values())], file.size, keys)
        except DamagedSeal:
            path.unlink(missing_ok=True)
    return len(others)


def _seal(path: Path, keys: SealingKeys) -> None:
    """Put a sealed file in the place of one in clear: encodings by header and values, a text as it is."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = content[: 8 + length] if path.suffix in (".safetensors", ".volume") else b""
    if len(head) > LONGEST_HEAD or len(head) > len(content):  # no encoding: cut short, say
        path.unlink()
        return
    write_sealed(path, head, [content[len(head) :]], len(content) - len(head), keys)


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a cache that comes of scans; what is being written has another name."""
    yield from (path for path in sorted(folder.glob("??/*")) if path.is_file() and path.name[0] != ".")
    if (memo := folder / FINGERPRINTS).is_file():
        yield memo


def _remove_cut_off(folder: Path) -> None:
    """Writes that a kill cut off before they were sealed, and memos of cohorts that name patients."""
    for path in folder.glob("??/.*"):
        if time.time() - path.stat().st_mtime > _CUT_OFF_S and sealed_under(path) is None:
            path.unlink(missing_ok=True)
    for path in folder.glob("cohort-*"):
        path.unlink(missing_ok=True)


def _wrap(folder: Path, keys: SealingKeys, opened_by: Opener) -> None:
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    said = {"form": 1, "opened_by": opened_by.kind, "salt": salt.hex(), "nonce": nonce.hex()}
    cipher = AESGCM(opened_by.wrapping_key(salt, new=True))
    sealed = cipher.encrypt(nonce, keys.current + b"".join(keys.earlier), canonical(said).encode())
    write_whole(folder / FILE, json.dumps({**said, "sealed": sealed.hex()}, indent=1) + "\n")


def _unwrapped(folder: Path, opened_by: Opener) -> SealingKeys:
    path = folder / FILE
    said = _read(path)
    if said["opened_by"] != opened_by.kind:
        raise ValueError(
            f"Expected a {said['opened_by']}, which opens {path}; site.yaml has a {opened_by.kind} "
            "(cache_key_file)."
        )
    salt, nonce, sealed = (bytes.fromhex(said.pop(name)) for name in ("salt", "nonce", "sealed"))
    cipher = AESGCM(opened_by.wrapping_key(salt))
    header = canonical({**said, "salt": salt.hex(), "nonce": nonce.hex()}).encode()
    try:
        clear = cipher.decrypt(nonce, sealed, header)
    except InvalidTag:
        raise ValueError(
            f"Expected the {opened_by.kind} that opens {path}; this one does not, or the file was changed."
        ) from None
    first, *earlier = (clear[at : at + KEY_BYTES] for at in range(0, len(clear), KEY_BYTES))
    return SealingKeys(first, tuple(earlier))


def _read(path: Path) -> dict[str, Any]:
    """The fields of `cache.key`, in the form that `_wrap` gives them; raises `ValueError`."""
    said = read_json(read_file(path, "the key of the encrypted cache"), f"the cache's key in {path}")
    lengths = {"salt": _SALT_BYTES, "nonce": _NONCE_BYTES}
    try:
        if set(said) != _FIELDS or said["form"] != 1 or said["opened_by"] not in ("passphrase", "key file"):
            raise ValueError
        if any(len(bytes.fromhex(said[name])) != length for name, length in lengths.items()):
            raise ValueError
        if any(bytes.fromhex(said[name]).hex() != said[name] for name in (*lengths, "sealed")):
            raise ValueError  # no key has two spellings
        if len(bytes.fromhex(said["sealed"])) not in [16 + n * KEY_BYTES for n in range(1, _MOST_KEYS + 1)]:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"Expected the key of an encrypted cache in {path}; got another file. Restore it from a backup, "
            "or remove the cache's folder: the scans are encoded again."
        ) from None
    return dict(said)
