"""A style as one vector of numbers that may be averaged: means as they are, deviations as logarithms.

The vector of a scan, or of the average of a patient's scans: channel means, log deviations, and of registered
crops the coarse map and its log deviations. What is averaged, protected or moved about in this space comes
back as an entry that can be restyled to.

What this file does not do: protect anything (`privacy/style_code.py`).

Axes: m = scans, c = channels, d h w = latent voxels, s = numbers of a style.
"""

import dataclasses
import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from meduet_models.style.moments import StyleEntry, StyleLayout, StyleMoments

_UNBOUNDED = 1e12


def style_length(channels: int, map_grid: tuple[int, int, int] | None) -> int:
    """Numbers in the vector of a style."""
    return 2 * channels * (1 if map_grid is None else 1 + math.prod(map_grid))


def entry_of_scans(latents: Float[Tensor, "m c d h w"], layout: StyleLayout) -> StyleEntry:
    """The style of these scans together, a patient's say. Raises `ValueError` where they are not finite."""
    unbounded = dataclasses.replace(layout, bound=_UNBOUNDED, parts=1, centre=False, amplitude=False)
    return StyleMoments.of_patient(latents, unbounded).entry()


def vector_of(entry: StyleEntry) -> Float64[Tensor, " s"]:
    """The entry as a vector."""
    parts = [entry.mean, entry.deviation.log()]
    if entry.map is not None and entry.map_deviation is not None:
        parts += [entry.map.flatten(), entry.map_deviation.log().flatten()]
    return torch.cat(parts).double()


def entry_of(vector: Float[Tensor, " s"], layout: StyleLayout) -> StyleEntry:
    """Back from `vector_of`; raises `ValueError` for a vector of another length."""
    channels, grid = layout.channels, layout.map_grid
    if len(vector) != (expected := style_length(channels, grid)):
        raise ValueError(f"Expected a style of {expected} numbers; got {len(vector)}.")
    sizes = [channels, channels] + ([] if grid is None else [channels * math.prod(grid)] * 2)
    mean, deviation, *rest = torch.split(vector.float(), sizes)
    if grid is None:
        return StyleEntry(mean=mean, deviation=deviation.exp())
    coarse, within = (part.reshape(channels, *grid) for part in rest)
    return StyleEntry(mean=mean, deviation=deviation.exp(), map=coarse, map_deviation=within.exp())
