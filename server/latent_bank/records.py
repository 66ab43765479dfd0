"""An item of the latent bank as sealed bytes, and back: all records of a bank have one layout and one size.

AES-256-GCM (`cryptography`): a random nonce, the record, a tag. The header of a record, which lies beside it
in clear, is authenticated with it: a record that was changed, moved or swapped does not open. What this file
does not do: know where a record lies (`tables.py`) or which are taken (`bank.py`).

Axes: b = items, c d h w = latents, l = label values, k = content channels, s = numbers in a style code.
"""

import dataclasses
import json
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jaxtyping import Float
from torch import Tensor

from federation.exchanges.latents import banked
from federation.plan.plan import LatentDtype, RunPlan
from federation.wire.sealing import recipient_key, recipient_of
from forms.form import build
from meduet_models.diffusion.conditions import Examples
from storage.files import write_once

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16


class DamagedRecord(ValueError):
    """A record is not what was written in its place."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """What an encoder at the centre makes of items."""

    content: Float[Tensor, "b k"]
    """Pooled content."""
    style: Float[Tensor, "b s"]
    """Style codes."""
    encoder_sha256: str
    """Hash of the encoder's weights."""


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """What a record holds."""

    latents: tuple[int, int, int, int]
    """Channels and grid of the latents."""
    dtype: LatentDtype
    """As they travelled."""
    labels: int = 0
    """Label values of the label map; 0: none."""
    content: int = 0
    """Numbers of pooled content; 0: none."""
    style: int = 0
    """Numbers of the style code; 0: none."""

    @staticmethod
    def of(plan: RunPlan, codes: Codes | None) -> "RecordLayout":
        """The layout of what sites release under `plan`."""
        return RecordLayout(
            latents=(plan.network.latent_channels, *plan.network.latent_grid),
            dtype=plan.release.latent_dtype,
            labels=banked(plan).labels,
            content=0 if codes is None else codes.content.shape[1],
            style=0 if codes is None else codes.style.shape[1],
        )

    def to_json(self) -> str:
        """For the bank's index."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=8)
    def from_json(text: str) -> "RecordLayout":
        """The inverse of `to_json`."""
        return build(RecordLayout, json.loads(text), "layout")

    @property
    def record(self) -> np.dtype[Any]:
        """A record as numpy sees it, without gaps."""
        values = "<f4" if self.dtype == "float32" else "<u2"  # numpy has no bfloat16: its bits
        fields: list[Any] = [
            ("latents", values, self.latents),
            ("site", "<i4"),
            ("body_part", "<i4"),
            ("category", "<i4"),
            ("spacing", "<f4", (3,)),
        ]
        if self.labels:
            fields.append(("label_map", "<f4", (self.labels, *self.latents[1:])))
        fields += [(name, "<f4", (size,)) for name in ("content", "style") if (size := getattr(self, name))]
        return np.dtype(fields)

    def pack(self, examples: Examples, codes: Codes | None = None) -> "np.ndarray[Any, Any]":
        """A record of each example. Latents that are not bfloat16 already lose digits in such a layout."""
        records = np.zeros(len(examples), self.record)
        records["latents"] = self._stored(examples.latents)
        for name in ("site", "body_part", "category", "spacing"):
            records[name] = getattr(examples, name).numpy()
        if examples.label_map is not None:
            records["label_map"] = examples.label_map.numpy()
        if codes is not None:
            records["content"], records["style"] = codes.content.numpy(), codes.style.numpy()
        return records

    def unpack(self, records: "np.ndarray[Any, Any]") -> Examples:
        """The examples of these records, copied."""
        latents = np.array(records["latents"], order="C")
        values = torch.from_numpy(latents)
        return Examples(
            latents=values if self.dtype == "float32" else values.view(torch.bfloat16).float(),
            site=torch.from_numpy(records["site"].astype(np.int64)),
            body_part=torch.from_numpy(records["body_part"].astype(np.int64)),
            spacing=torch.from_numpy(np.array(records["spacing"])),
            category=torch.from_numpy(records["category"].astype(np.int64)),
            label_map=torch.from_numpy(np.array(records["label_map"], order="C")) if self.labels else None,
        )

    def _stored(self, latents: Tensor) -> "np.ndarray[Any, Any]":
        latents = latents.detach().cpu().contiguous()
        if self.dtype == "float32":
            return latents.numpy()
        return latents.to(torch.bfloat16).view(torch.uint16).numpy()


def key_beside(folder: Path) -> Path:
    """Where the key of a bank or of a run lies, unless somebody says otherwise: beside its folder."""
    return folder.with_name(f"{folder.name}.key")


def public_key(path: Path) -> str:
    """The public key that sites seal latents to, for the bank whose key is in this file (made when there is
    none). Raises as `read_key`."""
    return recipient_of(recipient_key(read_key(path, create=True)))


def read_key(path: Path, create: bool) -> bytes:
    """The key in a file that only its owner may read; with `create`, made when there is no file.

    Raises `ValueError` when the file is absent, others may read it, or it holds no key.
    """
    if not path.is_file():
        if not create:
            raise ValueError(
                f"Expected the bank's key at {path}; there is none. Restore it: nothing opens without."
            )
        write_once(path, secrets.token_bytes(KEY_BYTES))
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise ValueError(
            f"Expected the key {path} to be its owner's alone (0600); its mode is {mode:o}. If others may "
            "have read it, the bank is no longer secret; otherwise chmod 600."
        )
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected {KEY_BYTES} bytes of key in {path}; got {len(key)}.")
    return key


class Seal:
    """What closes and opens records under one key. May be used by several threads."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def close(self, record: bytes, header: bytes) -> bytes:
        """The record, sealed with its header."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, record, header)

    def open(self, sealed: bytes, header: bytes, into: memoryview) -> None:
        """Open what `close` gave into a buffer of the record's size. Raises `DamagedRecord`."""
        if len(sealed) != NONCE_BYTES + len(into) + TAG_BYTES:
            raise DamagedRecord(f"Expected {len(into)} bytes and their seal; got {len(sealed)} in all.")
        try:
            self._cipher.decrypt_into(sealed[:NONCE_BYTES], memoryview(sealed)[NONCE_BYTES:], header, into)
        except InvalidTag:
            raise DamagedRecord("The record is not as it was written.") from None
