"""The observer's measures on planted latents, and on phantoms whose truth is known."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from client.settings import SiteConfig
from client.site import Site
from federation.plan.plan import RunPlan
from meduet_models.content_code import public_code
from meduet_models.meduet import MeDUET, layer_normed
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from server.config import compose_config, plain, plan_from
from simulations.evaluation import _codes, measure
from simulations.hospitals.held_out import Held, join, own_scans, paired_scans
from simulations.hospitals.make import PhantomHospitals, make_hospitals

SITES = ("north", "harbour")
NETWORK = ["width=24", "depth=1", "heads=2", "decoder_width=12", "decoder_depth=1", "decoder_heads=2"]


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    overrides = ["volumes.spacing_mm=[6,8,8]", "volumes.shape=[32,24,24]", "style.minimum_cohort=2"]
    config = plain(compose_config([*overrides, *(f"network.{own}" for own in NETWORK)]))
    tokenizer = load_tokenizer(TokenizerSpec())
    return plan_from(
        config,
        sites=SITES,
        tokenizer_sha256=tokenizer.sha256,
        latent_channels=tokenizer.latent_channels,
        stride=tokenizer.stride,
    )


@pytest.fixture(scope="module")
def phantoms(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Site]]:
    folder = tmp_path_factory.mktemp("phantoms")
    hospitals = make_hospitals(
        PhantomHospitals(num_hospitals=2, names=SITES, patients=5, paired=6, resolution_mm=4), folder
    )
    tokenizer = load_tokenizer(TokenizerSpec())
    configs = [
        SiteConfig(
            name=hospital.name,
            data_root=hospital.root,
            state_dir=folder / "sites" / hospital.name,
            layout=hospital.layout,
            modality_names={"*": plan.volumes.modality},
            split_fractions=(0.4, 0.3, 0.3),
            allow_non_private=True,
        )
        for hospital in hospitals
    ]
    return hospitals, [Site(config, tokenizer) for config in configs]


def planted(plan: RunPlan, sites: int = 2, patients: int = 15, anatomy: bool = True) -> Held:
    """The same patients at every site: a smooth anatomy, shifted and scaled by the site."""
    draws = torch.Generator().manual_seed(0)
    grid = plan.network.latent_grid
    bodies = torch.randn(patients, plan.network.latent_channels, *grid, generator=draws)
    bodies[:, 0, : grid[0] // 2] += 3 * torch.randn(patients, 1, 1, 1, generator=draws)
    known = bodies[:, 0, : grid[0] // 2].mean((1, 2, 3)) - bodies[:, 0, grid[0] // 2 :].mean((1, 2, 3))
    latents = torch.cat([bodies * (1 + 0.5 * site) + site for site in range(sites)])
    targets = known.repeat(sites)[:, None] if anatomy else torch.zeros(len(latents), 0)
    return Held(
        latents,
        tuple(s for s in range(sites) for _ in range(patients)),
        tuple(f"p{i}" for _ in range(sites) for i in range(patients)),
        targets,
        ("half",) if anatomy else (),
    )


def network(plan: RunPlan) -> MeDUET:
    return MeDUET(plan.network, len(plan.sites), seed=0)


def test_thorough_measures_find_what_was_planted(plan: RunPlan) -> None:
    held = planted(plan)
    training = [held.latents[:6], held.latents[15:21]]
    measured = measure(network(plan), plan, held, training, thorough=True)
    assert all(math.isfinite(value) for value in measured.values())
    assert measured["nested_site_from_style_mean_linear"] > 0.8
    assert measured["nested_site_from_style_mean_linear_p"] == pytest.approx(1 / 41)
    # Content sees each scan normalised: scaled and shifted, it is the same.
    for what in ("mean_linear", "deviation_linear", "tokens_linear", "mean_mlp"):
        assert measured[f"nested_site_from_content_{what}"] < 0.75
        assert measured[f"nested_site_from_content_{what}_p"] > 0.05
    assert measured["patient_from_content_among_all"] == 1.0
    assert measured["patient_from_style_among_all"] < 1.0
    assert measured["chance_patient_among_all"] == pytest.approx(1 / 29)
    # Which half is brighter is in where tokens are, and leaves no trace in their mean.
    assert measured["anatomy_from_content_tokens_half"] > 0.5 > 0.2 > measured["anatomy_from_content_half"]
    assert measured["anatomy_from_content"] == measured["anatomy_from_content_half"]
    assert "counterfactual_psnr" not in measured  # no tokenizer was given


def test_a_content_code_is_measured_and_a_late_site_taken_out_of_its_own_codes(plan: RunPlan) -> None:
    held = planted(plan, sites=3, patients=8)
    training = [held.latents[first : first + 8] for first in (0, 8, 16)]
    model = network(plan)
    assert not any("code" in name for name in measure(model, plan, held, training))
    with torch.no_grad():
        seen = layer_normed(model.encode(torch.randn(200, *held.latents.shape[1:])).content)
    config = plan.network
    model.set_content_code(public_code(seen, config.code_places, config.code_channels, config.code_size))
    with torch.no_grad():
        late = model.content_code(training[2])
    assert float(late.mean(0).norm()) > 1  # far from the federation's patients, as a site that is new
    measured = measure(model, plan, held, training, thorough=True)
    names = ("site_from_code", "site_from_code_mlp", "patient_from_code", "patient_from_code_among_all",
            "anatomy_from_code", "nested_site_from_code_linear", "nested_site_from_code_mlp")  # fmt: skip
    assert all(math.isfinite(measured[name]) for name in names)
    assert measured["patient_from_code"] > 0.9
    rows = [row for row, site in enumerate(held.site) if site == 2]
    with torch.no_grad():
        assert float(_codes(model, plan, held, training)[rows].mean(0).norm()) < 1e-4


def test_a_hospital_beyond_the_plan_is_measured_too(plan: RunPlan) -> None:
    held = planted(plan, sites=3, patients=5, anatomy=False)
    training = [held.latents[first : first + 3] for first in (0, 5, 10)]
    measured = measure(network(plan), plan, held, training, thorough=True)
    assert measured["chance_site"] == pytest.approx(1 / 3)
    assert measured["scans"] == 15 and not any(name.startswith("anatomy") for name in measured)


def test_the_quick_measures_are_what_they_are_without_the_thorough_ones(plan: RunPlan) -> None:
    held = planted(plan)
    training = [held.latents[:6], held.latents[15:21]]
    quick = measure(network(plan), plan, held, training)
    assert not any(name.startswith(("nested", "anatomy")) for name in quick)
    thorough = measure(network(plan), plan, held, training, thorough=True)
    assert quick == {name: thorough[name] for name in quick}


def test_paired_phantoms_know_their_deformation_and_their_volumes(plan: RunPlan, phantoms: Any) -> None:
    hospitals, sites = phantoms
    parts = [paired_scans(plan, s, h, i) for i, (s, h) in enumerate(zip(sites, hospitals, strict=True))]
    held = join([part for part in parts if part is not None])
    assert held.paired and len(held.site) == 12 and held.anatomy.shape == (12, len(held.anatomy_names))
    assert {
        "age",
        "sex",
        "volume_1",
        "volume_2",
        "volume_3",
        "deformation_x_000",
        "deformation_z_001",
    } <= set(held.anatomy_names)
    here, there = (held.anatomy[held.rows(site)] for site in (0, 1))
    column = held.anatomy_names.index
    assert torch.equal(here[:, column("deformation_y_010")], there[:, column("deformation_y_010")])
    grey = column("volume_2")
    torch.testing.assert_close(here[:, grey], there[:, grey], rtol=0.25, atol=0.0)
    assert here[:, column("deformation_x_000")].std() > 1
    training = [s.prepared(plan).latents([0, 1, 2]) for s in sites]
    measured = measure(network(plan), plan, held, training, tokenizer=sites[0].tokenizer)
    names = ("counterfactual_psnr", "counterfactual_psnr_identity", "counterfactual_psnr_histogram")
    assert all(3 < measured[name] < 60 for name in names)
    assert measured["counterfactual_psnr"] < measured["counterfactual_psnr_identity"]  # untrained


def test_own_scans_are_other_people_at_other_hospitals_and_their_volumes_are_counted(
    plan: RunPlan, phantoms: Any
) -> None:
    _, sites = phantoms
    scans = sites[0].prepared(plan)
    held = own_scans(plan, scans, 0, ("train", "validation", "test"))
    assert all(name.startswith("0/") for name in held.patient) and not held.paired
    rows = [row for split in ("train", "validation", "test") for row in scans.indices(split)]
    labels = scans.labels(rows)
    assert labels is not None
    expected = (labels == 3).flatten(1).sum(1) * 6.0 * 8.0 * 8.0
    torch.testing.assert_close(held.anatomy[:, held.anatomy_names.index("volume_3")], expected)
    with pytest.raises(ValueError, match="keeps none"):
        own_scans(plan, scans, 0, ("elsewhere",))


def test_joined_scans_do_not_know_what_only_others_know_and_absent_structures_have_no_volume(
    plan: RunPlan,
) -> None:
    one = planted(plan, sites=1, patients=2)
    first = dataclasses.replace(one, anatomy=torch.tensor([[1.0], [2.0]]), anatomy_names=("volume_1",))
    second = dataclasses.replace(
        one,
        anatomy=torch.tensor([[5.0, 60.0], [np.nan, 70.0]]),
        anatomy_names=("volume_4", "age"),
        site=(1, 1),
    )
    both = join([first, second])
    assert both.anatomy_names == ("age", "volume_1", "volume_4")
    expected = torch.tensor(
        [[np.nan, 1, 0], [np.nan, 2, 0], [60, 0, 5], [70, np.nan, np.nan]], dtype=torch.float32
    )
    torch.testing.assert_close(both.anatomy, expected, equal_nan=True)
    with pytest.raises(ValueError, match="got none"):
        join([])


def test_where_nothing_is_simulated_nobody_is_paired(plan: RunPlan, phantoms: Any) -> None:
    hospitals, sites = phantoms
    bare = dataclasses.replace(hospitals[0], paired=None)
    assert paired_scans(plan, sites[0], bare, 0) is None
