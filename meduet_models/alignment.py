"""Alignment: may a style token that another site made be used here? A self-test, run before any is.

A style head that stays at a site can drift into a language of its own; then its tokens mean nothing to
others' decoders (measured: a swap made with tokens of a head started elsewhere was 13 times worse than none).
The test needs nobody's scans but the site's own: dressed in each bank entry, they show both heads the same
styles, and

1. *agreement*: the two heads must give these styles the same tokens; 2. *gap closed*: the site's own decoder,
given its own content and the reference head's tokens of a style, must make scans whose statistics are mostly
those of that style.

What this file does not do: it aligns nothing, and it says nothing about styles that are not in the bank.

Axes: b = scans, n = tokens, s = style channels, c d h w = latents. Source: the failures of un-anchored style
heads (docs/log.md); gap closed as in `probes.py`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meduet_models.bank import StyleBank
from meduet_models.factors import Factors
from meduet_models.probes import style_gap_closed
from meduet_models.style import StyleLayout, StyleMoments

THRESHOLD = 0.5
"""What both measures must reach: most of the gap closed, most of the spread between styles seen alike."""


@runtime_checkable
class FactorModel(Protocol):
    """What the test needs of a network (`meduet.FactorNetwork`)."""

    def encode(self, latents: Tensor) -> Factors:
        """Content and style tokens of whole scans."""

    def decode(self, factors: Factors) -> Tensor:
        """Latents of factors."""


@dataclass(frozen=True)
class Alignment:
    """The outcome of the self-test."""

    passed: bool
    """Whether style tokens of the reference head may be used at this site."""
    gap_closed: float
    """Share of the style gap that foreign tokens closed in the own decoder, averaged over target sites."""
    agreement: float
    """1 - (distance between the heads' tokens)² / (spread of the reference's tokens between styles)²."""
    threshold: float
    """What both must reach."""
    reason: str
    """In one line, why."""

    @property
    def value(self) -> float:
        """The weaker of the two measures."""
        return min(self.gap_closed, self.agreement)


@torch.no_grad()
def check_alignment(
    own: FactorModel,
    reference: FactorModel,
    latents: Float[Tensor, "b c d h w"],
    bank: StyleBank,
    site: int,
    part: Int[Tensor, " b"] | None = None,
    threshold: float = THRESHOLD,
) -> Alignment:
    """Test whether tokens of the `reference` style head mean to the `own` model what its own head means.

    `own` is the site's network, `reference` the same network with the other style head (the broadcast one,
    the shared one, or another site's); `latents` are some of the site's own scans. Raises `ValueError` when
    the bank has no second site to be dressed as.
    """
    there = [t for t in range(len(bank.sites)) if bank.sites[t] in bank.present]
    if len(there) < 2 or site not in there:
        raise ValueError(
            "Expected this site and at least one other in the bank to test alignment; "
            f"the bank holds {len(there)}."
        )
    here = torch.full((len(latents),), site)
    dressed = {t: bank.restyle(latents, here, torch.full_like(here, t), part) for t in there}
    ours = torch.stack([own.encode(dressed[t]).style.mean(0) for t in there])  # sites n s
    theirs = torch.stack([reference.encode(dressed[t]).style.mean(0) for t in there])
    spread = (theirs - theirs.mean(0)).square().sum()
    agreement = 1 - float((ours - theirs).square().sum() / spread.clamp(min=1e-12))

    content = own.encode(latents).content
    layout = _layout(latents, bank)
    gaps = []
    for t, token in zip(there, theirs, strict=True):
        if t != site:
            swapped = own.decode(Factors(content, token.expand(len(latents), -1, -1)))
            gaps.append(style_gap_closed(*(_style(x, layout) for x in (swapped, latents, dressed[t]))))
    gap_closed = sum(gaps) / len(gaps)
    failed = [
        f"{name} is {value:.2f}"
        for name, value in (("agreement of the heads", agreement), ("style gap closed", gap_closed))
        if not value >= threshold
    ]
    reason = (
        f"Expected at least {threshold:g}; {' and '.join(failed)}. Use no style token of another site."
        if failed
        else f"Agreement {agreement:.2f} and style gap closed {gap_closed:.2f} reach {threshold:g}."
    )
    return Alignment(not failed, gap_closed, agreement, threshold, reason)


def _layout(latents: Tensor, bank: StyleBank) -> StyleLayout:
    channels, d, h, w = latents.shape[1:]
    coarse = bank.entries.map
    grid = None if coarse is None else (coarse.shape[-3], coarse.shape[-2], coarse.shape[-1])
    return StyleLayout(channels=channels, latent_grid=(d, h, w), map_grid=grid, bound=1e12)


def _style(latents: Tensor, layout: StyleLayout) -> Tensor:
    each_its_own = [str(row) for row in range(len(latents))]
    return StyleMoments.of(latents.cpu(), each_its_own, layout).entry().to_vector()
