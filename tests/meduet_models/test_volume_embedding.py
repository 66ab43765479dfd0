"""The U-Net on the volume as encoder: what it may see, where it starts, and how latents become a picture."""

import dataclasses

import pytest
import torch
from torch import Tensor

from meduet_models.factors import normalise
from meduet_models.meduet import MeDUET, NetworkConfig
from meduet_models.objective.demixing import mix_tokens
from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.objective.teacher import Teacher
from meduet_models.tokenizer.linear_decoder import NeighbourMoments
from meduet_models.tokenizer.patch_pca import from_patches
from meduet_models.tokens import patchify, unpatchify

CONFIG = NetworkConfig(
    latent_channels=2, latent_grid=(6, 8, 6), patch_size=2, width=12, depth=1, heads=2, decoder_width=12,
    decoder_depth=1, decoder_heads=2, code_size=4, encoder="volume_unet",
)  # fmt: skip
TOLERANCE = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def network() -> MeDUET:
    """With a picture, and a map to tokens that is not at its zeros any more."""
    made = MeDUET(CONFIG, 2, seed=1)
    assert made.embed_volume is not None
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (made.embed_volume.kernel, made.embed_volume.join.weight):
            tensor.copy_(torch.randn(tensor.shape, generator=draws) / 8)
        made.latent_mean.copy_(torch.randn(made.latent_mean.shape, generator=draws) / 4)
    return made


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(4, 2, 6, 8, 6, generator=torch.Generator().manual_seed(2))


def rolled(latents: Tensor, where: Tensor) -> Tensor:
    """The tokens of these places moved among themselves: a scan's own statistics stay as they are."""
    tokens = patchify(latents, 2).clone()
    for row, places in enumerate(where):
        tokens[row, places] = tokens[row, places].roll(1, dims=0)
    return unpatchify(tokens, CONFIG.token_grid, 2)


def pictured(network: MeDUET, latents: Tensor, draws: StepDraws, masked: bool) -> Tensor:
    """The latents whose picture the student's U-Net is shown first in a step of the objective."""
    config = ObjectiveConfig(masked_share=0.5, estimator="one_stream")
    batch = StepBatch(latents, torch.tensor([0, 1, 0, 1]), latents.flip(0))
    seen: list[Tensor] = []
    assert network.embed_volume is not None
    handle = network.embed_volume.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        MeduetObjective(config)(network, Teacher(network), batch, draws, 0.0 if masked else 0.9)
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module")
def draws() -> StepDraws:
    return draw_step(torch.Generator().manual_seed(3), 4, CONFIG.num_tokens, ObjectiveConfig(), (0, 1))


def test_what_a_mask_hides_does_not_reach_what_is_visible(network: MeDUET, latents: Tensor) -> None:
    visible = torch.rand(4, CONFIG.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    other = rolled(latents, ~visible)
    first, second = (network.embed_latents(x, visible)[visible] for x in (latents, other))
    torch.testing.assert_close(first, second, **TOLERANCE)
    whole, changed = (network.embed_latents(x)[visible] for x in (latents, other))  # the attack
    assert (whole - changed).abs().max() > 20 * TOLERANCE["atol"]


def test_a_masked_step_pictures_no_hidden_token(network: MeDUET, latents: Tensor, draws: StepDraws) -> None:
    shown, other = (
        pictured(network, x, draws, masked=True) for x in (latents, rolled(latents, draws.exchanged))
    )
    torch.testing.assert_close(shown, other, **TOLERANCE)
    kept = rolled(latents, ~draws.exchanged)
    assert not torch.allclose(pictured(network, kept, draws, masked=True), shown, **TOLERANCE)


def test_a_grid_pictures_nothing_of_the_tokens_that_it_lent(
    network: MeDUET, latents: Tensor, draws: StepDraws
) -> None:
    moved = latents.clone()
    moved[0] = rolled(latents, draws.exchanged)[0]
    shown, other = (pictured(network, x, draws, masked=False) for x in (latents, moved))
    changed = (shown - other).flatten(1).abs().amax(1)
    partner = int(draws.partner[0])
    assert changed[0] < TOLERANCE["atol"] and changed[partner] > 0.1
    late = [mix_tokens(network.embed_latents(x), draws.partner, draws.exchanged)[0] for x in (latents, moved)]
    kept = ~draws.exchanged[0]  # the attack: tokens are mixed after neighbours were looked at
    assert (late[0][kept] - late[1][kept]).abs().max() > 20 * TOLERANCE["atol"]


def test_a_restyled_scan_shows_nothing_of_the_style_it_had(network: MeDUET, latents: Tensor) -> None:
    gain, shift = torch.tensor([0.3, 2.0]).view(1, 2, 1, 1, 1), torch.tensor([1.0, -2.0]).view(1, 2, 1, 1, 1)
    restyled = gain * latents + shift
    torch.testing.assert_close(
        network.embed_latents(restyled), network.embed_latents(latents), rtol=1e-2, atol=1e-2
    )
    assert network.embed_volume is not None  # the attack: a picture in the scan's own style
    own, other = network.embed_volume(latents), network.embed_volume(restyled)
    assert (own - other).abs().max() > 0.2


def test_the_common_style_is_the_federated_centres(network: MeDUET, latents: Tensor) -> None:
    shown = network._common_latents(network.seen_tokens(latents))
    spread = (network.latent_deviation.square() + network.latent_mean.var((1, 2, 3), correction=0)).sqrt()
    torch.testing.assert_close(normalise(shown), normalise(latents), **TOLERANCE)
    torch.testing.assert_close(shown.mean((0, 2, 3, 4)), network.latent_mean.mean((1, 2, 3)), **TOLERANCE)
    torch.testing.assert_close(shown.std((2, 3, 4), correction=0), spread.expand(4, 2), **TOLERANCE)
    joint = MeDUET(dataclasses.replace(CONFIG, factor_paths="joint"), 2)
    torch.testing.assert_close(joint._common_latents(joint.seen_tokens(latents)), latents)


def test_it_begins_as_the_vit_of_its_seed(latents: Tensor) -> None:
    vit = MeDUET(dataclasses.replace(CONFIG, encoder="vit"), 2, seed=4)
    unet = MeDUET(CONFIG, 2, seed=4)
    weights = unet.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(unet.encode(latents).content, vit.encode(latents).content)
    again, other = MeDUET(CONFIG, 2, seed=4).state_dict(), MeDUET(CONFIG, 2, seed=5).state_dict()
    name = "embed_volume.levels.stem.0.convolution.weight"
    assert torch.equal(again[name], weights[name]) and not torch.equal(other[name], weights[name])


def test_a_picture_is_the_best_that_a_linear_map_decodes() -> None:
    draws = torch.Generator().manual_seed(0)
    latents, basis = torch.randn(3, 2, 6, 8, 6, generator=draws), torch.randn(2, 64, generator=draws)
    patches = torch.einsum("bcdhw,cp->bpdhw", latents, basis)
    made = MeDUET(CONFIG, 2)
    assert made.embed_volume is not None
    assert not made.embed_volume.picture(latents).any()  # none was set
    made.embed_volume.set_picture(NeighbourMoments.of(latents, patches))
    error = (made.embed_volume.picture(latents) - from_patches(patches)).square().mean()
    assert error < 0.01 * patches.var()
    other = MeDUET(CONFIG, 2, seed=9)
    assert other.embed_volume is not None
    other.embed_volume.see_as(made.embed_volume)
    assert torch.equal(other.embed_volume.picture(latents), made.embed_volume.picture(latents))


def test_tokens_of_four_latents_get_the_mean_of_more_cells() -> None:
    config = dataclasses.replace(
        CONFIG, latent_grid=(4, 8, 4), patch_size=4, style_map_grid=(1, 2, 1), code_size=2
    )
    made = MeDUET(config, 2)
    assert made.encode(torch.randn(2, 2, 4, 8, 4)).content.shape == (2, 2, 12)


@pytest.mark.parametrize(
    "changes", [{"patch_size": 1}, {"latent_grid": (2, 2, 2), "style_map_grid": (1, 1, 1), "code_size": 1}]
)
def test_grids_without_cells_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"network\.encoder=vit"):
        dataclasses.replace(CONFIG, **changes)
