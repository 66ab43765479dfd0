"""The common style of a bank: what latents of every site are taken into, so that what is left is anatomy.

The mean of the bank's entries (of deviations the mean logarithm). Latents of a site are moved there from the
site's own entry, and back: two fixed maps, the same for each scan, that follow from the bank alone. Where the
bank is protected, they tell nothing more of a patient.

What this file does not do: estimate a style, or know whose scans they are.

Axes: b = scans, c = channels, d h w = latent voxels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleEntry, StyleLayout, restyle
from meduet_models.style.restyling import own_entries


@dataclass(frozen=True)
class CommonStyle:
    """The common style of one bank."""

    style_bank: StyleBank
    """Entries of one body part."""
    entry: StyleEntry
    """Their mean."""

    @staticmethod
    def of(style_bank: StyleBank) -> "CommonStyle":
        """Raises `ValueError` for a bank without an entry."""
        present = [style_bank.sites.index(site) for site in style_bank.present]
        if not present:
            raise ValueError("Expected a bank with the style of at least one site; it has none.")
        rows = torch.tensor(present)
        found = style_bank.entry(rows, torch.zeros_like(rows))

        def mean_logarithm(values: Tensor) -> Tensor:
            return values.log().mean(0).exp()

        return CommonStyle(
            style_bank,
            StyleEntry(
                mean=found.mean.mean(0),
                deviation=mean_logarithm(found.deviation),
                map=None if found.map is None else found.map.mean(0),
                map_deviation=None if found.map_deviation is None else mean_logarithm(found.map_deviation),
            ),
        )

    def into(self, latents: Float[Tensor, "b c d h w"], site: str) -> Float[Tensor, "b c d h w"]:
        """Latents of a site in the common style. Raises `ValueError` for a site without an entry."""
        return restyle(latents, self._own(site), self.entry)

    def back(self, latents: Float[Tensor, "b c d h w"], site: str) -> Float[Tensor, "b c d h w"]:
        """The inverse of `into`."""
        return restyle(latents, self.entry, self._own(site))

    def dressed(self, public: Float[Tensor, "b c d h w"], layout: StyleLayout) -> Float[Tensor, "b c d h w"]:
        """Public scans in the common style, each taken out of the style that it has by itself."""
        return restyle(public, own_entries(public, layout), self.entry)

    def _own(self, site: str) -> StyleEntry:
        if site not in self.style_bank.present:
            raise ValueError("Expected the protected style of this site in the bank; it has none.")
        row = torch.tensor([self.style_bank.sites.index(site)])
        return self.style_bank.entry(row, torch.zeros_like(row))
