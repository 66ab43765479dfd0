"""Weights on disk: safetensors with a provenance header, written whole or not at all, named by a hash.

What it does not do: know any network, or read pickle. Where a tensor came from travels with it, in the
header, as one canonical JSON text, so that the same tensors and the same provenance give the same bytes.
Written, hashed and (`open_weights`) read one tensor at a time: a large network is never in memory twice for
that. Format: https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open
from torch import Tensor

from forms.json_text import read_json
from storage.files import whole_file

HEADER_KEY = "provenance"
LONGEST_HEADER = 100_000_000
"""Characters of a header: safetensors' own limit; a long run's metrics are in a checkpoint's."""


class StoredWeights(Mapping[str, Tensor]):
    """Tensors of a file, each read from it whenever it is asked for (CPU, stored dtype, memory of its own).

    The file stays open, so these are its tensors even when another takes its place.
    """

    def __init__(self, file: Any, names: Mapping[str, str]) -> None:
        self._file, self._names = file, dict(names)  # a safe_open, whose stubs leave out the types

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; raises `KeyError`, and `ValueError` when the file was cut short meanwhile."""
        try:
            tensor: Tensor = self._file.get_tensor(self._names[name])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Expected to read {name!r} from a weights file; got {error}.") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Names; nothing is read."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many tensors; nothing is read."""
        return len(self._names)

    def part(self, prefix: str) -> "StoredWeights":
        """Those whose names begin with `prefix`, under the rest of their names; nothing is read."""
        names = {name.removeprefix(prefix): n for name, n in self._names.items() if name.startswith(prefix)}
        return StoredWeights(self._file, names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name; no values are read."""
        return {name: tuple(self._file.get_slice(n).get_shape()) for name, n in self._names.items()}


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, str]) -> None:
    """Write `tensors` and `provenance` to `path` atomically: a reader sees the old or the new, never half.

    Tensors keep their dtype; those on another device come to the CPU one by one. Only the owner may read the
    file: latents and states of a site are written with this too. The folder must exist (`ValueError`
    otherwise).
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"Expected the folder {path.parent} to exist; create it, then save {path.name}.")
    header, values = written(tensors, provenance)
    with whole_file(path) as file:
        file.write(header)
        for one in values:
            file.write(one)


def written(
    tensors: Mapping[str, Tensor], provenance: Mapping[str, str]
) -> tuple[bytes, Iterator[memoryview]]:
    """What `save_weights` writes: the header, and the values of one tensor after the other."""
    names = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # each aligned to its size
    header = _header({name: tensors[name] for name in names}, provenance)
    return header, (_values(tensors[name]) for name in names)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (CPU, stored dtype) and provenance; a file without our header gives its own metadata.

    Raises `ValueError` when the file is absent, truncated, or not safetensors.
    """
    stored, provenance = open_weights(path)
    return dict(stored), provenance


def open_weights(path: str | Path) -> tuple[StoredWeights, dict[str, str]]:
    """As `load_weights`, but each tensor is read when it is asked for: what is large is never held whole."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Expected a weights file at {path}; there is none. Check the path.")
    try:
        opened: Any = safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected {path} to be a whole safetensors file; got a truncated or foreign one ({error}). "
            "Copy or download it again."
        ) from None
    stored = StoredWeights(opened, {name: name for name in opened.keys()})
    metadata: dict[str, str] = dict(opened.metadata() or {})
    if HEADER_KEY not in metadata:
        return stored, metadata
    what = f"the header of {path.name}"
    provenance = read_json(metadata[HEADER_KEY], what, longest=LONGEST_HEADER)
    if not isinstance(provenance, dict) or not all(isinstance(text, str) for text in provenance.values()):
        raise ValueError(f"Expected {what} to hold names with texts; got another.")
    return stored, provenance


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape by name; of stored weights no values are read."""
    if isinstance(tensors, StoredWeights):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def sha256_of_file(path: str | Path) -> str:
    """Hash of a file's bytes, header included; 64 hex digits. Raises `OSError` when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names; 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        title = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(title).to_bytes(8, "little"))  # lengths first: no two lists of tensors look alike
        digest.update(title)
        digest.update(_values(tensor))
    return digest.hexdigest()


def _values(tensor: Tensor) -> memoryview:
    """The bytes of its values in row order: its own memory where that is possible."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.stride(0) != 1:  # at most one value, expanded: contiguous, and yet without bytes of its own
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header(tensors: Mapping[str, Tensor], provenance: Mapping[str, str]) -> bytes:
    """What safetensors puts before the values: its length in eight bytes, then JSON and spaces."""
    header: dict[str, object] = {
        "__metadata__": {HEADER_KEY: json.dumps(dict(provenance), sort_keys=True)}
    }  # one key: the order of many is not defined
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        spec = TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=0,
            data_len=end - begin,
        )
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
