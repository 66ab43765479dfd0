"""Alignment: may style tokens that another site made be used here? A self-test, run before any are.

A style head that stays at a site can drift into a language of its own; then its tokens mean nothing to
others' decoders (measured: a swap made with tokens of a head started elsewhere was 13 times worse than none).
The test needs nobody's scans but the site's own. Both sides restyle their own scans to every bank entry, so
both have tokens of the same styles (`style_tokens`); the site's own decoder is then given its own content and
the foreign tokens of a style. Two things must come out:

1. *response*: what it makes differs from style to style as the styles do. A decoder that ignores tokens and
   always answers with the average style has none, yet closes half of the gap at a site whose own style is far
   out: the gap alone is no test.
2. *gap closed*: it comes near the style that was asked for, compared with what the site's own tokens can do.

Measured, 640 steps on four simulated scanners: response .64 to .75 with tokens of sites of the same run, -.62
to -.13 with those of another run or of a fresh head. Heads that start apart but then train with one shared
decoder, on every style of the bank, learn one language (.68 to .81): the test asks what is, not what was.

What this file does not do: it aligns nothing, sends nothing, and says nothing about styles that are not in
the bank.

Axes: b = scans, s = sites, n = tokens, k = style channels, c d h w = latents.
Source: the failures of un-anchored style heads (docs/log.md); gap closed as in `probes.py`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meduet_models.factors import Factors
from meduet_models.probes.swap_fidelity import style_gap_closed
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments

THRESHOLD = 0.5
"""Half of what can be done: 1 is perfect, 0 is a decoder that knows nothing of styles."""


@runtime_checkable
class FactorModel(Protocol):
    """What the test needs of a network (`meduet.FactorNetwork`)."""

    def encode(self, latents: Tensor) -> Factors:
        """Content and style tokens of whole scans."""

    def decode(self, factors: Factors) -> Tensor:
        """Latents of factors."""


@dataclass(frozen=True)
class Reading:
    """How a decoder answers to tokens of known styles."""

    response: float
    """Share of the variance between styles that is reproduced (1 - squared error / variance)."""
    gap_closed: float
    """Share of the style gap that is closed, averaged over the styles of other sites."""


@dataclass(frozen=True)
class Alignment:
    """The outcome of the self-test."""

    passed: bool
    """Whether these foreign style tokens may be used at this site."""
    foreign: Reading
    """What the decoder does with the foreign tokens."""
    own: Reading
    """What it does with the site's own: what it can do at all."""
    threshold: float
    """What `value` must reach."""
    reason: str
    """In one line, why."""

    @property
    def value(self) -> float:
        """The weaker of the response and the gap closed as a share of what the own tokens close."""
        if self.own.gap_closed <= 0:
            return min(self.foreign.response, 0.0)
        return min(self.foreign.response, self.foreign.gap_closed / self.own.gap_closed)


@torch.no_grad()
def style_tokens(
    model: FactorModel,
    latents: Float[Tensor, "b c d h w"],
    style_bank: StyleBank,
    site: int,
    part: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "s n k"]:
    """What `model` calls each site's style: mean tokens of this site's scans in that style; NaN where none is
    told.

    These are averages over all of `latents`; give a training cohort, never a few scans.
    """
    here = torch.full((len(latents),), site)
    tokens = {
        t: model.encode(style_bank.restyle(latents, here, torch.full_like(here, t), part)).style.mean(0)
        for t in _present(style_bank)
    }
    blank = torch.full_like(next(iter(tokens.values())), torch.nan)
    return torch.stack([tokens.get(t, blank) for t in range(len(style_bank.sites))])


@torch.no_grad()
def check_alignment(
    own: FactorModel,
    foreign: Float[Tensor, "s n k"],
    latents: Float[Tensor, "b c d h w"],
    style_bank: StyleBank,
    site: int,
    part: Int[Tensor, " b"] | None = None,
    threshold: float = THRESHOLD,
) -> Alignment:
    """Test whether `foreign` style tokens mean to the `own` model what they meant where they were made.

    `foreign` are another head's `style_tokens`; `latents` are some of this site's own scans. Raises
    `ValueError` when this site, or every other, has no style in the bank.
    """
    present = _present(style_bank)
    if site not in present or len(present) < 2:
        raise ValueError(
            "Expected the styles of this site and of another in the bank to test alignment; it holds "
            f"{', '.join(style_bank.present) or 'none'}."
        )
    here = torch.full((len(latents),), site)
    restyled = [style_bank.restyle(latents, here, torch.full_like(here, t), part) for t in present]
    layout, content = _layout(latents, style_bank), own.encode(latents).content
    source = _style(latents, layout)
    asked = torch.stack([_style(x, layout) for x in restyled])  # s v

    def read(tokens: Tensor) -> Reading:
        swapped = [own.decode(Factors(content, tokens[t].expand(len(latents), -1, -1))) for t in present]
        if not all(bool(torch.isfinite(x).all()) for x in swapped):
            return Reading(-math.inf, -math.inf)
        made = torch.stack([_style(x, layout) for x in swapped])  # s v
        gaps = [style_gap_closed(made[i], source, asked[i]) for i, t in enumerate(present) if t != site]
        error = (made - made.mean(0)) - (asked - asked.mean(0))
        variance = (asked - asked.mean(0)).square().sum().clamp(min=1e-12)
        return Reading(1 - float(error.square().sum() / variance), sum(gaps) / len(gaps))

    with_foreign, with_own = read(foreign), read(style_tokens(own, latents, style_bank, site, part))
    outcome = Alignment(False, with_foreign, with_own, threshold, "")
    said = (
        f"response {with_foreign.response:.2f} (own tokens {with_own.response:.2f}), "
        f"gap closed {with_foreign.gap_closed:.2f} (own tokens {with_own.gap_closed:.2f})"
    )
    if outcome.value >= threshold:
        return dataclasses.replace(
            outcome, passed=True, reason=f"Foreign style tokens are understood: {said}."
        )
    if with_own.response >= threshold:
        reason = f"Foreign style tokens are of another language, do not use them: {said}."
    else:
        reason = f"This decoder is not trained enough to tell, use no foreign tokens: {said}."
    return dataclasses.replace(outcome, reason=reason)


def _present(style_bank: StyleBank) -> list[int]:
    return [style_bank.sites.index(site) for site in style_bank.present]


def _layout(latents: Tensor, style_bank: StyleBank) -> StyleLayout:
    channels, d, h, w = latents.shape[1:]
    coarse = style_bank.entries.map
    grid = None if coarse is None else (coarse.shape[-3], coarse.shape[-2], coarse.shape[-1])
    return StyleLayout(channels=channels, latent_grid=(d, h, w), map_grid=grid, bound=1e12)


def _style(latents: Tensor, layout: StyleLayout) -> Tensor:
    each_its_own = [str(row) for row in range(len(latents))]
    return StyleMoments.of(latents.cpu(), each_its_own, layout).entry().to_vector()
