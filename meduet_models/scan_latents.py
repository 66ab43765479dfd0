"""A scan as latents, as it was encoded for training: what every reading of a scan by a model begins with.

What it does not do: keep latents (`client/latents/cache.py`), or read files (`scans/volumes.py`).

Axes: c d h w = latents.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.tokenizer.whole_scans import encode_whole
from scans.scans import Scan
from scans.volume_plan import VolumePlan
from scans.volumes import Prepared, prepare
from scans.whole_volumes import prepare_whole


def encoded(
    scan: Scan, volumes: VolumePlan, tokenizer: Tokenizer, device: torch.device | str
) -> tuple[Prepared, Float32[Tensor, "c d h w"]]:
    """A scan prepared and encoded as for training: its central crop or all of its foreground, as the plan
    says; latents on the CPU."""
    if volumes.extent == "scan":
        whole = prepare_whole(scan, volumes, tokenizer.stride)
        return whole, encode_whole(tokenizer, whole.volume, device).float()
    prepared = prepare(scan, volumes)
    return prepared, tokenizer.encode(prepared.volume[None].to(device))[0].float().cpu()
