"""Style codes of the sites, beside those of the scans: who is told which.

A scan can be told its own style or that of its site. Both are codes of one meaning (`conditioner.py`); here
they are chosen between, sample by sample. What this file does not do: draw who is told which.

Axes: b = samples, s = numbers in a style code.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meduet_models.bank import StyleBank
from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.conditions import Examples


@dataclass(frozen=True)
class SiteStyles:
    """Codes of all sites and body parts, and the conditioner for those of scans."""

    conditioner: Conditioner
    table: Float[Tensor, "sites parts s"] | None
    """None: no site has told a style."""
    present: Bool[Tensor, "sites parts"] | None
    """Where a site has an entry."""

    @staticmethod
    def of(conditioner: Conditioner, bank: StyleBank | None) -> "SiteStyles":
        """The codes of a style bank."""
        if bank is None or not bank.present:
            return SiteStyles(conditioner, None, None)
        return SiteStyles(conditioner, conditioner.style_of(bank.entries).cpu(), bank.count.cpu() > 0)

    def codes(self, examples: Examples, as_site: Bool[Tensor, " b"]) -> Float[Tensor, "b s"]:
        """Each scan's own code; its site's where that is asked for and the site has one for its body part."""
        own = self.conditioner.style(examples.latents)
        if self.table is None or self.present is None:
            return own
        site = examples.site.cpu()
        part = examples.body_part.cpu() if self.table.shape[1] > 1 else torch.zeros_like(site)
        known = (part >= 0) & (site >= 0) & (site < len(self.table))
        place = (site * known, part * known)
        worn = as_site & known & self.present[place]
        return torch.where(worn.unsqueeze(1).to(own.device), self.table[place].to(own.device), own)
