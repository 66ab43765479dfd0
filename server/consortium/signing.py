"""Signing what a consortium gives away, with its authority's key.

Does not do: check (`meduet_models/published/signature.py`), or open the authority (`provisioning.py`).
"""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from federation.keys.certificates import Authority
from meduet_models.published.signature import SUFFIX, signature_text, signed_message
from meduet_models.weights import sha256_of_file
from storage.files import write_whole


def sign_file(path: Path, authority: Authority) -> Path:
    """Write `<path>.sig` beside a file; the path of that. Raises `ValueError` when there is no file."""
    if not path.is_file():
        raise ValueError(f"Expected a file to sign at {path}; there is none.")
    sha256 = sha256_of_file(path)
    signature = authority.key.sign(signed_message(sha256), ec.ECDSA(SHA384()))
    beside = path.with_name(path.name + SUFFIX)
    write_whole(beside, signature_text(sha256, signature, authority.certificate))
    return beside
