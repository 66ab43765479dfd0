"""The people whose consent a plan needs at this hospital: their keys, their signatures, how many of them.

Each signs with a key of her own (Ed25519, RFC 8032), kept encrypted under her passphrase. What is signed
names this site, the plan, its code and the line of the book before it, so that a signature says nothing at
another site, of another plan or code, or once more after a withdrawal. Does not do: keep the book
(`approvals.py`), or protect `site.yaml`, which says whose keys count: whoever writes there decides.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from federation.keys.key_files import read_file, refuse_work_tree
from forms.json_text import canonical
from forms.names import Letters, SiteName
from forms.ranges import Entries, Range
from storage.files import private_folder, write_whole

SHORTEST_PASSPHRASE = 12
"""Characters of a passphrase, at least."""
PublicKeyText = Annotated[
    str, Letters(r"[A-Za-z0-9+/]{43}=", "a public key as meduet-site approver prints it (44 characters)")
]
"""An Ed25519 public key: 32 bytes in base64."""


@dataclass(frozen=True)
class ApprovalRule:
    """Whose approvals count, and how many a plan needs."""

    needed: Annotated[int, Range(at_least=1, at_most=16)] = 1
    """How many different people must approve a plan, in the same code, before it runs here."""
    people: Annotated[dict[SiteName, PublicKeyText], Entries(64)] = field(default_factory=dict)
    """Each approver's name and public key. Empty: whoever may write to `state_dir` approves, unsigned."""

    def __post_init__(self) -> None:
        """Refuse a rule that nobody can satisfy, or one person under two names."""
        if self.needed > max(1, len(self.people)):
            raise ValueError(
                f"Expected site.approvals.needed to be at most the number of people ({len(self.people)}); "
                f"got {self.needed}. Make a key for each: meduet-site approver NAME."
            )
        if len(set(self.people.values())) < len(self.people):
            raise ValueError("Expected a key for each of site.approvals.people; two have the same key.")


@dataclass(frozen=True)
class Signer:
    """One approver with her key, ready to sign."""

    name: str
    key: Ed25519PrivateKey = field(repr=False)

    def sign(self, statement: str) -> str:
        """Her signature of a statement, in base64."""
        return base64.b64encode(self.key.sign(statement.encode())).decode()


def statement(site: str, plan: str, bundle: str, after: str) -> str:
    """What an approver of `site` signs: hashes of plan, code, and the line of the book before hers."""
    purpose = "fedmeduet plan approval"
    return canonical({"purpose": purpose, "site": site, "plan": plan, "bundle": bundle, "after": after})


def signed(said: str, record: Mapping[str, Any], people: Mapping[str, str]) -> str | None:
    """Who of `people` signed the statement `said` in this record of the book; None when nobody did."""
    name, signature = record.get("by"), record.get("signature")
    if not isinstance(name, str) or not isinstance(signature, str) or name not in people:
        return None
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(people[name]))
    try:
        public.verify(base64.b64decode(signature, validate=True), said.encode())
    except (InvalidSignature, binascii.Error, ValueError):
        return None
    return name


def new_approver(path: Path, passphrase: str) -> str:
    """Write a new private key to `path`, encrypted under `passphrase`; the public key's text.

    Raises `ValueError` when the passphrase is short, a file is there already, or the folder is a git work
    tree's.
    """
    if len(passphrase) < SHORTEST_PASSPHRASE:
        raise ValueError(
            f"Expected a passphrase of {SHORTEST_PASSPHRASE} characters or more; got {len(passphrase)}."
        )
    if path.exists():
        raise ValueError(f"Expected a new file for the key; {path} is there already, and was left as it is.")
    private_folder(path.parent)
    refuse_work_tree(path.parent)
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase.encode())
    write_whole(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    path.chmod(0o600)
    return public_text(key.public_key())


def read_signer(path: Path, passphrase: str, people: Mapping[str, str]) -> Signer:
    """The approver whose key lies at `path`.

    Raises `ValueError` when the passphrase does not open it, or its public key is nobody's of `people`.
    """
    try:
        key = load_pem_private_key(read_file(path, "an approver's key"), passphrase.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"Expected {path} to be an approver's key that this passphrase opens.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"Expected {path} to be an Ed25519 key, as meduet-site approver makes it.")
    public = public_text(key.public_key())
    name = next((name for name, text in people.items() if text == public), None)
    if name is None:
        raise ValueError(
            f"Expected the key of one of {', '.join(people) or 'nobody'} (site.yaml: approvals.people); "
            f"{path} has the public key {public}."
        )
    return Signer(name, key)


def public_text(key: Ed25519PublicKey) -> str:
    """A public key as it stands in `site.yaml`."""
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
