import pytest
import torch
from torch import Tensor

from meduet_models.factors import Factors
from meduet_models.style.bank import StyleBank
from meduet_models.style.head_alignment import Alignment, check_alignment, style_tokens
from meduet_models.style.moments import StyleLayout, StyleMoments

GRID = (4, 6, 4)
LAYOUT = StyleLayout(channels=2, latent_grid=GRID, map_grid=None, bound=1e6)
SITES = ("oslo", "lyon", "turin", "ghent")


def scans(site: int) -> Tensor:
    generator = torch.Generator().manual_seed(site)
    mean = torch.randn(1, 2, 1, 1, 1, generator=generator) * 2
    return torch.randn(12, 2, *GRID, generator=generator) * (0.5 + 0.6 * site) + mean


BANK = StyleBank.of(
    SITES, {s: StyleMoments.of(scans(i), list(map(str, range(12))), LAYOUT) for i, s in enumerate(SITES)}
)


class Normaliser:
    """A perfect factor model: content is the normalised scan, style its statistics in its own language."""

    def __init__(self, seed: int, drift: float = 0.0) -> None:
        language = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0]
        wander = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed + 1))
        self.language = language + drift * wander

    def encode(self, latents: Tensor) -> Factors:
        deviation, mean = torch.std_mean(latents, (2, 3, 4), correction=0)
        content = (latents - mean[..., None, None, None]) / deviation[..., None, None, None]
        style = torch.cat([mean, deviation.log()], 1) @ self.language
        return Factors(content.flatten(2).transpose(1, 2), style[:, None].expand(-1, 96, -1))

    def decode(self, factors: Factors) -> Tensor:
        said = factors.style.mean(1) @ self.language.inverse()
        mean, deviation = said[:, :2], said[:, 2:].clamp(-5, 5).exp()
        content = factors.content.transpose(1, 2).unflatten(2, GRID)
        return content * deviation[..., None, None, None] + mean[..., None, None, None]


def outcome_of(own: Normaliser, other: Normaliser) -> Alignment:
    """Oslo tests the tokens that Lyon made of every style, on Lyon's own scans."""
    return check_alignment(own, style_tokens(other, scans(1), BANK, 1), scans(0), BANK, 0)


def test_heads_with_the_same_start_pass_with_some_drift() -> None:
    for drift in (0.0, 0.05):
        outcome = outcome_of(Normaliser(0, drift), Normaliser(0))
        assert outcome.passed and outcome.value >= outcome.threshold == 0.5, outcome.reason
    assert outcome_of(Normaliser(0), Normaliser(0)).value > 0.9


@pytest.mark.parametrize("start", range(1, 11))
def test_heads_started_apart_fail(start: int) -> None:
    outcome = outcome_of(Normaliser(10 * start), Normaliser(0))
    assert not outcome.passed
    assert outcome.own.response > 0.9 and "of another language" in outcome.reason


class Deaf(Normaliser):
    """Ignores the tokens it is given and always answers with the average style of the bank."""

    def decode(self, factors: Factors) -> Tensor:
        pooled = BANK.pooled()
        said = torch.cat([pooled.mean, pooled.deviation.log()]) @ self.language
        return super().decode(Factors(factors.content, said.expand_as(factors.style)))


@pytest.mark.parametrize("site", range(4))
def test_a_decoder_that_ignores_style_fails_even_with_the_very_same_head(site: int) -> None:
    foreign = style_tokens(Normaliser(0), scans(site), BANK, site)
    outcome = check_alignment(Deaf(0), foreign, scans(site), BANK, site)
    assert not outcome.passed and outcome.foreign.response < 0.1 and "not trained enough" in outcome.reason


def test_a_far_out_site_with_a_deaf_decoder_would_pass_on_the_gap_alone() -> None:
    gaps = [
        check_alignment(
            Deaf(0), style_tokens(Deaf(0), scans(s), BANK, s), scans(s), BANK, s
        ).foreign.gap_closed
        for s in range(4)
    ]
    assert max(gaps) > 0.5  # why the response is asked for as well


def test_a_head_that_says_the_same_of_every_style_fails() -> None:
    class Mute(Normaliser):
        def encode(self, latents: Tensor) -> Factors:
            factors = super().encode(latents)
            return Factors(factors.content, torch.ones_like(factors.style))

    assert not outcome_of(Normaliser(0), Mute(0)).passed
    assert not outcome_of(Mute(0), Mute(0)).passed


def test_tokens_that_are_not_numbers_fail_and_raise_nothing() -> None:
    foreign = style_tokens(Normaliser(0), scans(1), BANK, 1)
    outcome = check_alignment(Normaliser(0), foreign * torch.nan, scans(0), BANK, 0)
    assert not outcome.passed


def test_styles_that_nobody_told_have_no_tokens_and_are_not_tested() -> None:
    moments_of = {
        s: StyleMoments.of(scans(i), list(map(str, range(12))), LAYOUT) for i, s in enumerate(SITES[:2])
    }
    bank = StyleBank.of(SITES, moments_of)
    foreign = style_tokens(Normaliser(0), scans(1), bank, 1)
    assert torch.isfinite(foreign).flatten(1).all(1).tolist() == [True, True, False, False]
    assert check_alignment(Normaliser(0), foreign, scans(0), bank, 0).passed


def test_with_nobody_else_in_the_bank_there_is_nothing_to_test() -> None:
    alone = StyleBank.of(SITES, {"oslo": StyleMoments.of(scans(0), list(map(str, range(12))), LAYOUT)})
    foreign = style_tokens(Normaliser(0), scans(0), alone, 0)
    with pytest.raises(ValueError, match="holds oslo"):
        check_alignment(Normaliser(0), foreign, scans(0), alone, 0)
