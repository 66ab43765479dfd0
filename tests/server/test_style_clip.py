"""The bound of one patient's style follows from the latent channels, and hardly any public phantom is cut."""

import pytest
import torch

from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.style.moments import StyleMoments
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from server.config import compose_config, plain, plan_from
from server.tokenizer.training import held_out_phantoms

SHAPE = (32, 48, 32)


def plan_of(channels: int, *overrides: str) -> RunPlan:
    settings = plain(compose_config([f"volumes.shape={list(SHAPE)}", *overrides]))
    return plan_from(
        settings, sites=("a", "b", "c"), tokenizer_sha256="0" * 64, latent_channels=channels, stride=4
    )


@pytest.fixture(scope="module")
def lengths() -> dict[int, torch.Tensor]:
    """Of the statistics of 32 public phantoms, one by one, unbounded, by channels."""
    phantoms, found = torch.stack(held_out_phantoms(0, 32, SHAPE)), {}
    for channels in (4, 8):
        layout = survey_layout(plan_of(channels, "release.style_clip=1000"))
        latents = load_tokenizer(TokenizerSpec(channels=channels)).encode(phantoms)
        found[channels] = torch.tensor(
            [StyleMoments.of_patient(scan[None], layout, [0]).norm() for scan in latents]
        )
    return found


@pytest.mark.parametrize(("channels", "bound"), [(4, 10.0), (8, 14.14), (16, 20.0)])
def test_the_bound_grows_with_the_root_of_the_channels_unless_it_is_set(channels: int, bound: float) -> None:
    assert plan_of(channels).release.style_clip == bound
    assert plan_of(channels, "release.style_clip=3").release.style_clip == 3


def test_with_privacy_no_bound_is_made_that_would_have_no_effect() -> None:
    private = plan_of(8, "privacy=sums", "style.minimum_cohort=3")
    assert private.release.style_clip == plan_of(4).release.style_clip


@pytest.mark.parametrize("channels", [4, 8])
def test_at_most_one_of_32_public_phantoms_is_cut(channels: int, lengths: dict[int, torch.Tensor]) -> None:
    assert int((lengths[channels] > plan_of(channels).release.style_clip).sum()) <= 1


def test_the_bound_of_four_channels_would_cut_phantoms_of_eight(lengths: dict[int, torch.Tensor]) -> None:
    assert int((lengths[8] > plan_of(4).release.style_clip).sum()) > 1
