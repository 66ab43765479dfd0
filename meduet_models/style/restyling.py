"""Public scans restyled to a site, each from its own style.

Every scan is taken out of the style that it has by itself, so that nothing of it is left over: public scans
vary in appearance far more than any site's.

What this file does not do: draw scans (`server/public_scans.py`), or know whose style it is.

Axes: b = scans, s = sites, c = channels, d h w = latent voxels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meduet_models.style.bank import StyleBank
from meduet_models.style.code import entry_of_scans
from meduet_models.style.moments import StyleEntry, StyleLayout, restyle


def own_entries(latents: Float[Tensor, "b c d h w"], layout: StyleLayout) -> StyleEntry:
    """The style of each scan by itself, side by side."""
    entries = [entry_of_scans(one[None], layout) for one in latents]
    maps = [(e.map, e.map_deviation) for e in entries if e.map is not None and e.map_deviation is not None]
    return StyleEntry(
        mean=torch.stack([e.mean for e in entries]),
        deviation=torch.stack([e.deviation for e in entries]),
        map=torch.stack([coarse for coarse, _ in maps]) if maps else None,
        map_deviation=torch.stack([within for _, within in maps]) if maps else None,
    )


def restyle_each(
    latents: Float[Tensor, "b c d h w"], own: StyleEntry, style_bank: StyleBank, site: Int[Tensor, " b"]
) -> Float[Tensor, "b c d h w"]:
    """Scan i, whose own style is row i of `own`, in the style of site `site[i]`."""
    return restyle(latents, own, style_bank.entry(site, torch.zeros_like(site)))
