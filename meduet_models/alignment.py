"""Alignment: may style tokens that another site made be used here? A self-test, run before any are.

A style head that stays at a site can drift into a language of its own; then its tokens mean nothing to
others' decoders (measured: a swap made with tokens of a head started elsewhere was 13 times worse than none).
The test needs nobody's scans but the site's own. Both sides dress their own scans in every bank entry, so
both have tokens of the same styles (`style_tokens`); the site's own decoder is then given its own content and
the foreign tokens of a style. Two things must come out, and `value` is the weaker:

1. *gap closed*: the statistics of what it makes are mostly those of the style that was asked for;
2. *response*: they differ from style to style as the styles do. Without this a decoder that ignores tokens
   and always answers with the average style would pass at a site whose own style is far out.

The same with the site's own tokens says whether its decoder could have.

What this file does not do: it aligns nothing, sends nothing, and says nothing about styles that are not in
the bank.

Axes: b = scans, s = sites, n = tokens, k = style channels, c d h w = latents.
Source: the failures of un-anchored style heads (docs/log.md); gap closed as in `probes.py`.
"""

import math
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
"""What both measures must reach: 1 is perfect, 0 is what a decoder does that knows nothing of styles."""


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
    """Whether these foreign style tokens may be used at this site."""
    gap_closed: float
    """Share of the style gap that foreign tokens closed, averaged over the styles of other sites."""
    response: float
    """Share of the variance between styles that foreign tokens reproduced: 1 - squared error / variance."""
    with_own: float
    """The weaker of both with the site's own tokens: what its decoder can do at all."""
    threshold: float
    """What both must reach."""
    reason: str
    """In one line, why."""

    @property
    def value(self) -> float:
        """The weaker of the two."""
        return min(self.gap_closed, self.response)


@torch.no_grad()
def style_tokens(
    model: FactorModel,
    latents: Float[Tensor, "b c d h w"],
    bank: StyleBank,
    site: int,
    part: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "s n k"]:
    """What `model` calls each site's style: mean tokens of this site's scans in that style; NaN where none is
    told.

    These are averages over all of `latents`; give a training cohort, never a few scans.
    """
    here = torch.full((len(latents),), site)
    tokens = {
        t: model.encode(bank.restyle(latents, here, torch.full_like(here, t), part)).style.mean(0)
        for t in _present(bank)
    }
    blank = torch.full_like(next(iter(tokens.values())), torch.nan)
    return torch.stack([tokens.get(t, blank) for t in range(len(bank.sites))])


@torch.no_grad()
def check_alignment(
    own: FactorModel,
    foreign: Float[Tensor, "s n k"],
    latents: Float[Tensor, "b c d h w"],
    bank: StyleBank,
    site: int,
    part: Int[Tensor, " b"] | None = None,
    threshold: float = THRESHOLD,
) -> Alignment:
    """Test whether `foreign` style tokens mean to the `own` model what they meant where they were made.

    `foreign` are another head's `style_tokens`; `latents` are some of this site's own scans. Raises
    `ValueError` when this site, or every other, has no style in the bank.
    """
    present = _present(bank)
    if site not in present or len(present) < 2:
        raise ValueError(
            "Expected the styles of this site and of another in the bank to test alignment; it holds "
            f"{', '.join(bank.present) or 'none'}."
        )
    here = torch.full((len(latents),), site)
    dressed = [bank.restyle(latents, here, torch.full_like(here, t), part) for t in present]
    layout, content = _layout(latents, bank), own.encode(latents).content
    source = _style(latents, layout)
    asked = torch.stack([_style(x, layout) for x in dressed])  # s v

    def measured(tokens: Tensor) -> tuple[float, float]:
        swapped = [own.decode(Factors(content, tokens[t].expand(len(latents), -1, -1))) for t in present]
        if not all(bool(torch.isfinite(x).all()) for x in swapped):
            return -math.inf, -math.inf
        made = torch.stack([_style(x, layout) for x in swapped])  # s v
        gaps = [style_gap_closed(made[i], source, asked[i]) for i, t in enumerate(present) if t != site]
        error = (made - made.mean(0)) - (asked - asked.mean(0))
        variance = (asked - asked.mean(0)).square().sum().clamp(min=1e-12)
        return sum(gaps) / len(gaps), 1 - float(error.square().sum() / variance)

    gap_closed, response = measured(foreign)
    with_own = min(measured(style_tokens(own, latents, bank, site, part)))
    passed = gap_closed >= threshold and response >= threshold
    said = f"With foreign style tokens: gap closed {gap_closed:.2f}, response {response:.2f}"
    if passed:
        reason = f"{said}; both reach {threshold:g}."
    elif with_own >= threshold:
        reason = f"{said}; with its own {with_own:.2f}: the tokens are of another language. Do not use them."
    else:
        reason = f"{said}; with its own {with_own:.2f}: the decoder is not trained enough to tell."
    return Alignment(passed, gap_closed, response, with_own, threshold, reason)


def _present(bank: StyleBank) -> list[int]:
    return [bank.sites.index(site) for site in bank.present]


def _layout(latents: Tensor, bank: StyleBank) -> StyleLayout:
    channels, d, h, w = latents.shape[1:]
    coarse = bank.entries.map
    grid = None if coarse is None else (coarse.shape[-3], coarse.shape[-2], coarse.shape[-1])
    return StyleLayout(channels=channels, latent_grid=(d, h, w), map_grid=grid, bound=1e12)


def _style(latents: Tensor, layout: StyleLayout) -> Tensor:
    each_its_own = [str(row) for row in range(len(latents))]
    return StyleMoments.of(latents.cpu(), each_its_own, layout).entry().to_vector()
