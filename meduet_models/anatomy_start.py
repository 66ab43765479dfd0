"""A start from public anatomy: weights of a `VolumeUNet` that never saw a patient, from their file.

`canonical`: learned to say where in the public template a voxel lies and what is there. `shapes`: the
control, learned on random shapes without any template. `none`: He's start, from a seed. Each has a hash,
which a plan names. What is shipped lies beside the code; a Flower bundle carries code only, so a site whose
installation has no such file gets the weights with the question, and checks the hash. Training is the
centre's (`server/anatomy/`). What this file does not do: train, or fetch anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from meduet_models.volume_unet import VolumeUNet
from meduet_models.weights import load_weights, save_weights

AnatomyKind = Literal["canonical", "shapes"]
"""What a start learned from."""
AnatomyStart = Literal["canonical", "shapes", "none"]
"""What a network starts from."""
KIND_KEY = "anatomy_start"  # of a weights file's provenance


@dataclass(frozen=True)
class StoredStart:
    """A start from its file."""

    network: VolumeUNet
    kind: AnatomyKind
    provenance: Mapping[str, str]
    """Header of the file: settings, steps, what it knows of pieces it never saw."""


def load_start(path: Path) -> StoredStart:
    """Read a start; raises `ValueError` when the file is absent, damaged, or holds something else."""
    tensors, provenance = load_weights(path)
    kind = provenance.get(KIND_KEY, "")
    if kind not in get_args(AnatomyKind):
        raise ValueError(f"Expected {path.name} to be a start from public anatomy; its header says of none.")
    network = VolumeUNet()
    mine = network.state_dict()
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in mine.items()}:
        raise ValueError(f"Expected the weights of a U-Net on the volume in {path.name}; got others.")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"Expected finite weights in {path.name}; got others. Make it again.")
    network.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return StoredStart(network, kind, provenance)  # type: ignore[arg-type]


def save_start(
    path: Path, kind: AnatomyKind, tensors: Mapping[str, Tensor], provenance: Mapping[str, str]
) -> None:
    """Write a start, rounded to half precision: 1.9 MB."""
    stored = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    save_weights(path, stored, {**provenance, KIND_KEY: kind})


def started_unet(start: AnatomyStart, *, seed: int = 0, path: Path | None = None) -> VolumeUNet:
    """A U-Net on the volume with this start: the shipped one, or that of `path`; `none`: from `seed`.

    Raises `ValueError` when there is no such file, or it is another start than `start` says.
    """
    if start == "none":
        return VolumeUNet(seed=seed)
    stored = load_start(path or shipped_path(start))
    if stored.kind != start:
        raise ValueError(f"Expected anatomy_start={start}; the file is of {stored.kind}.")
    return stored.network


def shipped_path(kind: AnatomyKind) -> Path:
    """Where the shipped start of this kind lies, if it is shipped."""
    return Path(__file__).with_name(f"anatomy_start_{kind}.safetensors")
