"""Harmonisation against a truth that is known: planted latents, and phantoms seen by two scanners."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federation.plan.plan import RunPlan
from meduet_models.diffusion.sampling import SamplingSettings
from meduet_models.meduet import MeDUET
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleLayout, StyleMoments
from simulations.generation.harmonisation import (
    ALL,
    CEILING,
    HarmonisationRow,
    fidelity,
    measure_harmonisation,
)
from simulations.hospitals.held_out import Held
from tests.client.conftest import make_plan
from tests.generative_models import VOLUMES, small_model, small_tokenizer
from tests.meduet_models.diffusion.small_models import NETWORK, small_latents

PATIENTS = 5
FEW = SamplingSettings(steps=2, solver="euler")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[HarmonisationRow], Path]:
    """Two sites whose latents differ by exactly what the bank knows: a scale and a shift of each channel."""
    tokenizer = small_tokenizer()
    plan: RunPlan = make_plan(network=NETWORK, volumes=VOLUMES, sites=("north", "south", "west"))
    bodies = small_latents(PATIENTS, 11)
    latents = [bodies, 0.8 * bodies + torch.tensor([0.3, -0.2])[None, :, None, None, None]]
    volumes = [tokenizer.decode(x) for x in latents]
    layout = StyleLayout(channels=2, latent_grid=(4, 6, 4), map_grid=NETWORK.style_map_grid, bound=1e3)
    names = [str(n) for n in range(PATIENTS)]
    bank = StyleBank.of(
        plan.sites,
        {site: StyleMoments.of(x, names, layout) for site, x in zip(plan.sites, latents, strict=False)},
    )
    held = Held(
        torch.cat(latents), (0,) * PATIENTS + (1,) * PATIENTS, (*names, *names), torch.zeros(10, 0), ()
    )
    folder = tmp_path_factory.mktemp("harmonisation")
    rows = measure_harmonisation(
        small_model(tokenizer, bank=bank), plan, tokenizer, held, latents, folder,
        volumes=torch.cat(volumes), settings=FEW, swap_model=MeDUET(NETWORK, 3, seed=0),
    )  # fmt: skip
    return rows, folder


def value(rows: list[HarmonisationRow], method: str, source: str = ALL, measure: str = "psnr_db") -> float:
    (found,) = [r.value for r in rows if (r.method, r.source, r.measure) == (method, source, measure)]
    return found


def test_every_way_is_measured_on_both_pairs_and_on_their_mean(measured: Any) -> None:
    rows, folder = measured
    methods = {"nothing", "histogram matching", "MeDUET swap", "style bank, restyled", "diffusion, sampled",
               "diffusion, inverted", CEILING}  # fmt: skip
    assert {row.method for row in rows} == methods and len(rows) == len(methods) * 3 * 2
    assert {(row.source, row.target) for row in rows} == {("north", "south"), ("south", "north"), (ALL, ALL)}
    assert all(row.low <= row.value <= row.high and row.patients == PATIENTS for row in rows)
    for method in methods:
        for measure in ("psnr_db", "ssim"):
            pairs = [value(rows, method, site, measure) for site in ("north", "south")]
            assert value(rows, method, measure=measure) == pytest.approx(np.mean(pairs))
    table = list(csv.DictReader((folder / "harmonisation.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in table] == [row.value for row in rows]
    assert (folder / "harmonisation.json").is_file() and (folder / "harmonisation.png").stat().st_size > 5000


def test_where_the_bank_knows_the_whole_difference_restyling_reaches_the_truth_and_random_weights_do_not(
    measured: Any,
) -> None:
    rows, _ = measured
    assert value(rows, "style bank, restyled") > value(rows, "nothing") + 10
    assert value(rows, "style bank, restyled") > value(rows, "diffusion, sampled") + 10


def test_fidelity_is_that_of_each_patient() -> None:
    truth = torch.rand(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = truth.clone()
    moved[1] = (truth[1] - 0.5) * 0.8 + 0.5
    moved[2] = moved[2] * 3 - 1  # clipped to what can be seen
    found = fidelity(moved, truth)
    error = float((moved[1] - truth[1]).square().mean())
    assert found[1, 0] == pytest.approx(-10 * np.log10(error), rel=1e-4)
    clipped = float((moved[2].clamp(0, 1) - truth[2]).square().mean())
    assert found[2, 0] == pytest.approx(-10 * np.log10(clipped), rel=1e-4)
    assert found[0, 1] == pytest.approx(1.0) and found[0, 0] > 100
    assert 0 < found[2, 1] < found[1, 1] < 1


def test_patients_that_are_not_paired_are_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    held = Held(small_latents(4), (0, 0, 1, 1), ("a", "b", "c", "d"), torch.zeros(4, 0), ())
    plan: RunPlan = make_plan(network=NETWORK, volumes=VOLUMES)
    given: dict[str, Any] = {"volumes": torch.zeros(4, 1, 16, 24, 16), "settings": FEW}
    with pytest.raises(ValueError, match="same patients"):
        measure_harmonisation(small_model(tokenizer), plan, tokenizer, held, [], tmp_path, **given)
    paired = dataclasses.replace(held, patient=("a", "b", "a", "b"))
    with pytest.raises(ValueError, match="4 volumes"):
        measure_harmonisation(
            small_model(tokenizer), plan, tokenizer, paired, [], tmp_path,
            **given | {"volumes": torch.zeros(3, 1, 16, 24, 16)},
        )  # fmt: skip
