"""What probes are read beside, on planted latents."""

import dataclasses
import math

import pytest
import torch

from federation.plan.plan import RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from server.config import compose_config, plain, plan_from
from simulations.hospitals.held_out import Held
from simulations.yardsticks import yardsticks

NETWORK = ["width=24", "depth=1", "heads=2", "decoder_width=12", "decoder_depth=1", "decoder_heads=2"]


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    overrides = ["volumes.spacing_mm=[6,8,8]", "volumes.shape=[32,24,24]", "style.minimum_cohort=2"]
    config = plain(compose_config([*overrides, *(f"network.{own}" for own in NETWORK)]))
    tokenizer = load_tokenizer(TokenizerSpec())
    return plan_from(
        config,
        sites=("a", "b"),
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )


def people(plan: RunPlan, per_site: int, seed: int) -> Held:
    """Different people at two hospitals; those of the second are older. Nothing of it is in their scans."""
    draws = torch.Generator().manual_seed(seed)
    latents = torch.randn(
        2 * per_site, plan.network.latent_channels, *plan.network.latent_grid, generator=draws
    )
    site = (0,) * per_site + (1,) * per_site
    age = torch.tensor([[40.0 + 40 * s] for s in site]) + torch.randn(2 * per_site, 1, generator=draws)
    return Held(latents, site, tuple(f"{s}/{i}" for i, s in enumerate(site)), age, ("age",))


def test_age_alone_tells_the_site_where_content_does_not(plan: RunPlan) -> None:
    held = people(plan, 20, 0)
    training = [people(plan, 12, 1).latents[:12], people(plan, 12, 1).latents[12:]]
    model = MeDUET(plan.network, 2, seed=plan.seed)
    read = yardsticks(model, plan, held, training)
    assert read["site_from_covariates"] > 0.95
    assert read["site_from_content_given_covariates"] < 0.8
    assert (read["fitted_patients_per_site"], read["fresh_patients_per_site"]) == (12.0, 20.0)
    assert 0 <= read["site_from_content_fitted"] <= 1 and "site_from_code_fitted" not in read
    assert read["hidden_error_ridge"] > 0.8, "noise cannot be told from its neighbours"
    assert read["hidden_error"] > 0.8
    assert all(math.isfinite(read[f"anatomy_from_{factor}"]) for factor in ("content", "style"))


def test_people_scanned_at_every_site_have_no_covariates_that_could_tell_it(plan: RunPlan) -> None:
    held = people(plan, 8, 0)
    paired = dataclasses.replace(held, patient=held.patient[:8] * 2)
    read = yardsticks(MeDUET(plan.network, 2, seed=0), plan, paired, [held.latents[:8], held.latents[8:]])
    assert "site_from_covariates" not in read and read["fresh_patients_per_site"] == 8.0
