"""One meaning for the style of a scan and of a site; content as analysis reads it; strict sizes."""

import pytest
import torch

from meduet_models.diffusion.conditioner import Conditioner, condition_sizes
from meduet_models.diffusion.conditions import CONDITIONS
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from tests.meduet_models.diffusion.small_models import (
    NETWORK,
    small_conditioner,
    small_encoder,
    small_examples,
    small_latents,
)


def layout(maps: bool) -> StyleLayout:
    return StyleLayout(
        channels=2, latent_grid=(4, 6, 4), map_grid=NETWORK.style_map_grid if maps else None, bound=1e9
    )


@pytest.mark.parametrize("maps", [True, False])
def test_a_site_with_one_scan_and_that_scan_have_one_style_code(maps: bool) -> None:
    latents = small_latents(3)
    conditioner = small_conditioner(maps)
    bank = StyleBank.of(
        ("a", "b", "c"),
        {name: StyleMoments.of_patient(latents[i : i + 1], layout(maps)) for i, name in enumerate("abc")},
    )
    torch.testing.assert_close(
        conditioner.style_of(bank.entry(torch.arange(3))), conditioner.style(latents), atol=1e-4, rtol=1e-4
    )


def test_the_style_of_a_constant_scan_is_finite() -> None:
    assert bool(torch.isfinite(small_conditioner().style(torch.ones(1, 2, 4, 6, 4))).all())


def test_style_reads_a_shift_and_a_scale_of_the_scan() -> None:
    conditioner, latents = small_conditioner(maps=False), small_latents(1)
    scale = small_encoder().latent_deviation
    brighter = conditioner.style(2 * latents + 1) - conditioner.style(latents)
    torch.testing.assert_close(brighter[0, 2:], torch.full((2,), 2.0).log())
    torch.testing.assert_close(brighter[0, :2], (latents.mean((0, 2, 3, 4)) + 1) / scale)


def test_content_is_that_of_the_encoder_with_its_erasure() -> None:
    encoder = small_encoder()
    encoder.set_erasure(torch.zeros(24), torch.eye(24) - torch.full((24, 24), 1 / 24))
    latents = small_latents(2)
    assert torch.equal(Conditioner(encoder, maps=True).content(latents), encoder.content_tokens(latents))


def test_conditions_have_the_declared_sizes() -> None:
    examples = small_examples(3)
    conditions = small_conditioner().conditions(examples, CONDITIONS)
    sizes = condition_sizes(NETWORK, CONDITIONS, maps=True, body_parts=1, categories=2, labels=3)
    assert conditions.content is not None and conditions.style is not None
    assert conditions.content.shape == (3, 2 * 3 * 2, sizes.content)
    assert conditions.style.shape == (3, sizes.style)
    assert sizes.names == CONDITIONS


def test_nothing_is_told_that_is_not_asked_for() -> None:
    conditions = small_conditioner().conditions(small_examples(2), ("style",), torch.zeros(2, 52))
    assert conditions.content is None and conditions.spacing is None and conditions.label_map is None
    assert conditions.style is not None and not conditions.style.any()


def test_a_bank_without_maps_is_refused_by_a_model_with_them() -> None:
    moments = StyleMoments.of_patient(small_latents(1), layout(False))
    with pytest.raises(ValueError, match="with coarse maps"):
        small_conditioner(maps=True).style_of(moments.entry())
    moments = StyleMoments.of_patient(small_latents(1), layout(True))
    with pytest.raises(ValueError, match="without coarse maps"):
        small_conditioner(maps=False).style_of(moments.entry())
