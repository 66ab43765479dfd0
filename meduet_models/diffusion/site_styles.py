"""Styles of the sites, beside those of the scans: who is told which, and whose content is seen in whose.

A scan can be told its own style or that of its site. Both are codes of one meaning (`conditioner.py`); here
they are chosen between, sample by sample. And a scan can be restyled to another site's style, to tell its
content from that, or to be learned so. What this file does not do: draw who is told what.

Axes: b = samples, s = numbers in a style code, c d h w = latents.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meduet_models.diffusion.conditioner import Conditioner
from meduet_models.diffusion.conditions import Examples
from meduet_models.style.bank import StyleBank


@dataclass(frozen=True)
class SiteStyles:
    """Codes of all sites and body parts, and the conditioner for those of scans."""

    conditioner: Conditioner
    table: Float[Tensor, "sites parts s"] | None
    """None: no site has told a style."""
    present: Bool[Tensor, "sites parts"] | None
    """Where a site has an entry."""

    @staticmethod
    def of(conditioner: Conditioner, style_bank: StyleBank | None) -> "SiteStyles":
        """The codes of a style bank."""
        if style_bank is None or not style_bank.present:
            return SiteStyles(conditioner, None, None)
        return SiteStyles(
            conditioner, conditioner.style_of(style_bank.entries).cpu(), style_bank.count.cpu() > 0
        )

    def codes(self, examples: Examples, as_site: Bool[Tensor, " b"]) -> Float[Tensor, "b s"]:
        """Each scan's own code; its site's where that is asked for and the site has one for its body part."""
        own = self.conditioner.style(examples.latents)
        if self.table is None or self.present is None:
            return own
        site = examples.site.cpu()
        part = examples.body_part.cpu() if self.table.shape[1] > 1 else torch.zeros_like(site)
        known = (part >= 0) & (site >= 0) & (site < len(self.table))
        place = (site * known, part * known)
        of_site = as_site & known & self.present[place]
        return torch.where(of_site.unsqueeze(1).to(own.device), self.table[place].to(own.device), own)


def restyled_examples(
    style_bank: StyleBank,
    examples: Examples,
    who: Bool[Tensor, " b"],
    target_choice: Float[Tensor, " b"],
) -> Examples:
    """The examples, those of `who` moved to the style of another site that has one for their body part, and
    said to be that site's.

    `target_choice` in [0, 1) says which of those sites. A scan whose own site told no style stays as it is.
    """
    present = style_bank.count.cpu() > 0  # sites, body parts
    site = examples.site.cpu()
    part = examples.body_part.cpu() if present.shape[1] > 1 else torch.zeros_like(site)
    target = site.clone()
    for row in who.nonzero()[:, 0].tolist():
        own, its = int(site[row]), int(part[row])
        if its < 0 or not 0 <= own < len(present) or not present[own, its]:
            continue
        others = [other for other in present[:, its].nonzero()[:, 0].tolist() if other != own]
        if others:
            target[row] = others[int(float(target_choice[row]) * len(others))]
    latents = style_bank.restyle(examples.latents, site, target, part)
    return dataclasses.replace(examples, latents=latents, site=target.to(examples.site.device))
