"""Weights on disk: safetensors with a provenance header, written whole or not at all, named by a hash.

What it does not do: know any network, or read pickle. Where a tensor came from travels with it, in the
header, as one canonical JSON text, so that the same tensors and the same provenance give the same bytes.
Format: https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

HEADER_KEY = "provenance"


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, str]) -> None:
    """Write `tensors` and `provenance` to `path` atomically: a reader sees the old or the new, never half.

    Tensors keep their dtype. Only the owner may read the file: latents and states of a site are written with
    this too. The folder must exist (`ValueError` otherwise).
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"Expected the folder {path.parent} to exist; create it, then save {path.name}.")
    header = {HEADER_KEY: json.dumps(dict(provenance), sort_keys=True)}  # one key: safetensors shuffles many
    # cloned: a view into a larger storage would be written, or refused, with all of it
    content = save({k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}, header)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (CPU, stored dtype) and provenance; a file without our header gives its own metadata.

    Raises `ValueError` when the file is absent, truncated, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Expected a weights file at {path}; there is none. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected {path} to be a whole safetensors file; got a truncated or foreign one ({error}). "
            "Copy or download it again."
        ) from None
    if HEADER_KEY not in metadata:
        return tensors, metadata
    provenance: dict[str, str] = json.loads(metadata[HEADER_KEY])
    return tensors, provenance


def sha256_of_file(path: str | Path) -> str:
    """Hash of a file's bytes, header included; 64 hex digits. Raises `OSError` when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names; 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        title = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(title).to_bytes(8, "little"))  # lengths first: no two lists of tensors look alike
        digest.update(title)
        flat = tensor.reshape(-1)
        if flat.stride(0) != 1:  # at most one value, expanded: contiguous, and yet without bytes of its own
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
