"""One whole scan encoded, and the crops that are read of it (`volumes.extent: scan`).

Whatever asks for the latents of a scan without saying where gets one crop, always the same: that around the
centre of the foreground (`central_start`). Training draws its own: uniformly among all places where enough of
the crop is foreground (`draw_start`), and where there is none, the place with most. A draw looks at the
stored map of foreground cells, never at latents.

Does not do: read or resample a scan (`scans/whole_volumes.py`), or keep files (`cache.py`).

Axes: d h w = cells, that is latent voxels.
"""

import json
import math

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from client.latents.latent_set import FOREGROUND, LATENTS
from meduet_models.tokenizer.tokenizer import Tokenizer
from meduet_models.tokenizer.whole_scans import encode_whole
from scans.whole_volumes import WholeVolume

Start = tuple[int, int, int]
TRIES = 32
"""Places that a draw looks at one by one before it looks at all of them."""


def encoded(
    prepared: WholeVolume, tokenizer: Tokenizer, crop: Start, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Latents and foreground of a whole scan as arrays to be stored, and what is said of them: geometry, and
    where the crop for those begins who ask for one."""
    foreground = prepared.foreground
    tensors = {
        LATENTS: encode_whole(tokenizer, prepared.volume, device).float().contiguous(),
        FOREGROUND: foreground.to(torch.uint8),
    }
    said = {
        "geometry": json.dumps(prepared.geometry.to_dict()),
        "start": json.dumps(central_start(foreground, crop)),
    }
    return tensors, said


def central_start(foreground: Bool[Tensor, "d h w"], crop: Start) -> Start:
    """Where a crop begins that lies around the foreground's centre of mass, as far as the scan goes."""
    centre = foreground.nonzero().double().mean(dim=0).tolist()
    d, h, w = (
        min(max(0, round(middle - (edge - 1) / 2)), side - edge)
        for middle, edge, side in zip(centre, crop, foreground.shape, strict=True)
    )
    return d, h, w


def draw_start(
    foreground: Bool[np.ndarray, "d h w"], crop: Start, least: float, generator: torch.Generator
) -> Int[Tensor, "3"]:
    """Where a drawn crop begins: uniform among the places where at least this share of it is foreground;
    where there is none, the place with most."""
    places = tuple(side - edge + 1 for side, edge in zip(foreground.shape, crop, strict=True))
    needed = math.ceil(least * math.prod(crop) - 1e-9)
    for number in torch.randint(math.prod(places), (TRIES,), generator=generator).tolist():
        start = np.unravel_index(number, places)
        inside = foreground[tuple(slice(a, a + edge) for a, edge in zip(start, crop, strict=True))]
        if np.count_nonzero(inside) >= needed:
            return torch.tensor([int(a) for a in start])
    counts = _counts(foreground, crop)
    enough = np.flatnonzero(counts >= min(needed, counts.max()))
    chosen = enough[int(torch.randint(len(enough), (), generator=generator))]
    return torch.tensor([int(a) for a in np.unravel_index(chosen, places)])


def _counts(foreground: Bool[np.ndarray, "d h w"], crop: Start) -> np.ndarray:
    """Foreground cells of the crop at each place, from sums along one axis after the other."""
    counts = foreground.astype(np.int64)
    for axis, edge in enumerate(crop):
        total = np.cumsum(np.moveaxis(counts, axis, 0), axis=0)
        total = np.concatenate([np.zeros_like(total[:1]), total])
        counts = np.moveaxis(total[edge:] - total[:-edge], 0, axis)
    return counts
