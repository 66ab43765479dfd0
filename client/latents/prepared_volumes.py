"""Prepared volumes beside their latents: what networks that see the volume are shown, made once per scan.

A volume is what the tokenizer encoded: oriented, resampled, windowed, cropped. It is prepared from the scan
when a network first asks for it and kept beside the scan's latents, in half precision, under the latents' own
name, which is a hash of all that it depends on; so it goes when they go. It is patient data as the scan is:
it stays at the site, readable by its owner only, and nothing that leaves is computed from it but what passes
the gate.

Does not do: encode (`cache.py`), or choose scans (`labelled.py`).

Axes: D H W = voxels.
"""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from client.latents.cache_files import CacheFiles, Place
from client.scans.cohort import ScanEntry, read_entry
from scans.volume_plan import VolumePlan
from scans.volumes import prepare

_VOLUME = "volume"


def volume_path(latents: Path) -> Path:
    """Where the prepared volume of an encoding is kept, if one is."""
    return latents.with_suffix(".volume")


def prepared_volume(
    entry: ScanEntry, latents: Path, plan: VolumePlan, files: CacheFiles, view: int = 0
) -> Float16[Tensor, "1 D H W"]:
    """The volume of a scan that the file `latents` encodes, prepared now where it is not kept yet.

    Raises `UnusableScan` when the scan is gone or changed since it was encoded, and `ValueError` where whole
    scans were encoded, of which there is no one volume.
    """
    if plan.extent == "scan":
        raise ValueError(
            "Expected volumes.extent=crop for a network that sees volumes; got scan: use network=tokens."
        )
    path = volume_path(latents)
    if (kept := _kept(path, plan, files)) is not None:
        return kept
    scan, _ = read_entry(entry, plan)
    volume = prepare(scan, plan, view).volume.to(torch.float16)
    files.write(path, {_VOLUME: volume}, {})
    return volume


def _kept(path: Path, plan: VolumePlan, files: CacheFiles) -> Tensor | None:
    """What is kept; None where nothing is, or what is there is not as it was written."""
    try:
        file = files.open(path)
        field = json.loads(file.head)[_VOLUME]
        place = Place(field["data_offsets"][0], np.dtype("<f2"), tuple(field["shape"]))
        if field["dtype"] != "F16" or place.shape != (1, *plan.shape) or place.num_bytes != file.size:
            return None
        return torch.from_numpy(file.array(place).copy())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
