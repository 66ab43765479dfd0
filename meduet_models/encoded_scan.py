"""An encoded scan as a file: the latents of one scan, with all that is needed to use them elsewhere.

Written by a site (`meduet-site encode`), read by the centre (`meduet-server synthesize --content`), which
opens no scan. One safetensors file, readable by its owner only.

**The file is patient data.** The tokenizer's decoder is public, so latents are a scan; the header says so.
Writing it sends nothing: who carries it to another place carries a scan there, outside the gate, and needs
the right to do so. What this file does not do: encode, or judge that right.

Axes: c d h w = latents.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forms.json_text import read_json
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors

KIND = "encoded scan"
PATIENT_DATA = "Patient data: the scan can be decoded from these latents."
LATENTS = "latents"
_NOT_COMPARED = frozenset(
    {"views", "crop_foreground"}
)  # of a volume plan: what no voxel of the scan itself depends on


@dataclass(frozen=True, eq=False)
class EncodedScan:
    """Latents of one scan and where they come from."""

    latents: Float[Tensor, "c d h w"]
    """Raw latents, float32."""
    tokenizer_sha256: str
    """Tokenizer that made them."""
    volumes: Mapping[str, Any]
    """How the scan became a volume: a volume plan as plain values."""
    geometry: Mapping[str, Any]
    """Where the volume lies in the patient: affines and shapes as plain lists."""
    spacing_mm: tuple[float, float, float]
    """Of the scan before resampling, along the RAS axes."""
    start: tuple[int, int, int] = (0, 0, 0)
    """Of a whole scan: first latent voxel of the crop around its foreground's centre."""

    @property
    def sha256(self) -> str:
        """Hash of the latents."""
        return sha256_of_tensors({LATENTS: self.latents})

    def central(self, grid: tuple[int, int, int]) -> Float[Tensor, "c d h w"]:
        """What a network of this grid sees of the scan at once. Raises `ValueError` when it is less."""
        ends = [a + n for a, n in zip(self.start, grid, strict=True)]
        if min(self.start) < 0 or any(b > n for b, n in zip(ends, self.latents.shape[1:], strict=True)):
            raise ValueError(
                f"Expected latents of at least {grid} from {self.start}; got {tuple(self.latents.shape[1:])}."
            )
        return self.latents[:, *(slice(a, b) for a, b in zip(self.start, ends, strict=True))]

    def check(self, tokenizer_sha256: str, volumes: Mapping[str, Any], name: str = "the scan") -> None:
        """Raise `ValueError` unless a model of this tokenizer and volume plan may read the latents."""
        if self.tokenizer_sha256 != tokenizer_sha256:
            raise ValueError(
                f"Expected {name} to be encoded by tokenizer {tokenizer_sha256[:8]}…, as the model's; it was "
                f"by {self.tokenizer_sha256[:8]}…. Encode it again with `meduet-site encode --model`."
            )
        mine, wanted = _compared(self.volumes), _compared(volumes)
        if other := sorted(key for key in mine.keys() | wanted.keys() if mine.get(key) != wanted.get(key)):
            raise ValueError(
                f"Expected {name} to be prepared with {other[0]}={wanted.get(other[0])}, as the model's "
                f"scans; it was with {mine.get(other[0])}. Encode it again with `meduet-site encode --model`."
            )


def save_encoded_scan(path: Path, scan: EncodedScan) -> None:
    """Write a scan's latents, marked as patient data. Raises `ValueError` unless the name ends in
    .safetensors and the folder is there."""
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a file name that ends in .safetensors; got {path.name}.")
    header = {
        "kind": KIND,
        "patient_data": PATIENT_DATA,
        "tokenizer_sha256": scan.tokenizer_sha256,
        "volumes": json.dumps(dict(scan.volumes), sort_keys=True),
        "geometry": json.dumps(dict(scan.geometry), sort_keys=True),
        "spacing_mm": json.dumps(list(scan.spacing_mm)),
        "start": json.dumps(list(scan.start)),
    }
    save_weights(path, {LATENTS: scan.latents.float()}, header)


def load_encoded_scan(path: Path) -> EncodedScan:
    """Read what `save_encoded_scan` wrote; raises `ValueError` for anything else."""
    tensors, header = load_weights(path)
    if header.get("kind") != KIND or set(tensors) != {LATENTS} or tensors[LATENTS].ndim != 4:
        raise ValueError(
            f"Expected {path.name} to be an encoded scan; it is another file. Make one with "
            "`meduet-site encode`."
        )
    latents = tensors[LATENTS]
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(
            f"Expected finite latents in {path.name}; got NaN or infinity. Encode the scan again."
        )
    try:
        x, y, z = map(float, read_json(header["spacing_mm"]))
        d, h, w = map(int, read_json(header.get("start", "[0, 0, 0]")))
        volumes, geometry = dict(read_json(header["volumes"])), dict(read_json(header["geometry"]))
        tokenizer_sha256 = header["tokenizer_sha256"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Expected the header of an encoded scan in {path.name}; it is incomplete. Encode the scan again."
        ) from error
    return EncodedScan(latents, tokenizer_sha256, volumes, geometry, (x, y, z), (d, h, w))


def _compared(volumes: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"extent": "crop"}  # of a file that does not say: there was no other
    values |= json.loads(json.dumps(dict(volumes)))  # tuples and lists alike
    return {key: value for key, value in values.items() if key not in _NOT_COMPARED}
