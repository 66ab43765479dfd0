"""Prepared volumes beside their latents: what networks that see the volume are shown, made once per scan.

A volume is what the tokenizer encoded: oriented, resampled, windowed, cropped. It is prepared from the scan
when a network first asks for it and kept beside the scan's latents, in half precision, under the latents' own
name, which is a hash of all that it depends on; so it goes when they go. It is patient data as the scan is:
it stays at the site, readable by its owner only, and nothing that leaves is computed from it but what passes
the gate.

Does not do: encode (`cache.py`), or choose scans (`labelled.py`).

Axes: D H W = voxels.
"""

from pathlib import Path

import torch
from jaxtyping import Float16
from torch import Tensor

from client.scans.cohort import ScanEntry, read_entry
from meduet_models.weights import load_weights, save_weights
from scans.volume_plan import VolumePlan
from scans.volumes import prepare

_VOLUME = "volume"


def volume_path(latents: Path) -> Path:
    """Where the prepared volume of an encoding is kept, if one is."""
    return latents.with_suffix(".volume")


def prepared_volume(
    entry: ScanEntry, latents: Path, plan: VolumePlan, view: int = 0
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
    if (kept := _kept(path, plan)) is not None:
        return kept
    scan, _ = read_entry(entry, plan)
    volume = prepare(scan, plan, view).volume.to(torch.float16)
    save_weights(path, {_VOLUME: volume}, {})
    return volume


def _kept(path: Path, plan: VolumePlan) -> Tensor | None:
    """What is kept; None where nothing is, or what is there is not as it was written."""
    if not path.is_file():
        return None
    try:
        volume = load_weights(path)[0].get(_VOLUME)
    except ValueError:
        return None
    whole = volume is not None and volume.dtype == torch.float16 and volume.shape == (1, *plan.shape)
    return volume if whole else None
