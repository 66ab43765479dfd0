"""The evaluation of a generative model, whole and tiny: what it writes, says and refuses."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditioner import condition_sizes
from meduet_models.diffusion.conditions import Condition, Examples
from meduet_models.diffusion.settings import TransformerShape
from meduet_models.diffusion.transformer import DiffusionConfig, DiffusionTransformer
from meduet_models.meduet import FactorNetwork
from meduet_models.style.bank import StyleBank
from meduet_models.style.moments import StyleMoments
from meduet_models.tokenizer.tokenizer import TokenizerSpec, load_tokenizer
from server.config import compose_config, plain, plan_from
from simulations.generation import page as generation_page
from simulations.generation.evaluate import evaluate_generation
from simulations.generation.page import generation_part
from simulations.generation.samples import CONTENT, NOTHING, OTHER, OWN, STYLE, requests, usable_rows
from simulations.generation.settings import GenerationSettings
from simulations.hospitals.held_out import Held

SITES = ("north", "harbour")
NETWORK = ["width=24", "depth=1", "heads=2", "decoder_width=12", "decoder_depth=1", "decoder_heads=2"]
SETTINGS = GenerationSettings(
    samples=5, steps=1, solver="euler", step_counts=(1, 2), step_samples=4, resamples=4, seeds=2, patients=2,
    volumes=1, most_real=12,
)  # fmt: skip
TOKENIZER = load_tokenizer(TokenizerSpec())


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    overrides = ["volumes.spacing_mm=[6,8,8]", "volumes.shape=[32,24,24]", "style.minimum_cohort=2"]
    config = plain(compose_config([*overrides, *(f"network.{own}" for own in NETWORK)]))
    return plan_from(
        config,
        sites=SITES,
        tokenizer_sha256=TOKENIZER.sha256,
        latent_channels=TOKENIZER.latent_channels,
        stride=TOKENIZER.stride,
    )


def scanned(plan: RunPlan, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    site = torch.arange(count) % 2
    latents = torch.randn(count, plan.network.latent_channels, *plan.network.latent_grid, generator=draws)
    return latents * (1 + 0.5 * site.reshape(-1, 1, 1, 1, 1)) + site.reshape(-1, 1, 1, 1, 1), site


def held_out(plan: RunPlan) -> Held:
    latents, site = scanned(plan, 10, 1)
    return Held(latents, tuple(site.tolist()), tuple(f"p{i}" for i in range(10)), torch.zeros(10, 0), ())


def examples(plan: RunPlan) -> Examples:
    latents, site = scanned(plan, 12, 2)
    unknown = torch.full((12,), -1)
    return Examples(
        latents=latents,
        site=site,
        body_part=unknown,
        spacing=torch.full((12, 3), torch.nan),
        category=unknown,
    )


def model(
    plan: RunPlan, names: tuple[Condition, ...] = ("content", "style"), policy: str = "raw", bank: bool = True
) -> GenerativeModel:
    latents, site = scanned(plan, 12, 3)
    moments = {
        name: StyleMoments.of(latents[site == i], [str(j) for j in range(6)], survey_layout(plan))
        for i, name in enumerate(SITES)
    }
    styles = StyleBank.of(SITES, moments)
    sizes = condition_sizes(plan.network, names, maps=True, body_parts=0, categories=0, labels=0)
    config = DiffusionConfig(
        latent_channels=plan.network.latent_channels, latent_grid=plan.network.latent_grid, sizes=sizes,
        path="linear",
        shape=TransformerShape(patch_size=2, width=24, depth=1, heads=2),
    )  # fmt: skip
    encoder = FactorNetwork(plan.network, seed=0).eval().requires_grad_(False)
    encoder.set_latent_scale(styles.centre, styles.scale)
    return GenerativeModel(
        transformer=DiffusionTransformer(config, seed=0).eval().requires_grad_(False),
        encoder=encoder,
        bank=styles if bank else None,
        sites=SITES,
        directions={},
        tokenizer_sha256=TOKENIZER.sha256,
        volumes=dataclasses.asdict(plan.volumes),
        body_parts=(),
        categories=(),
        policy=policy,
        patient_data=policy == "raw",
        provenance={},
    )


@pytest.fixture(scope="module")
def evaluated(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    held, said = held_out(plan), []
    volumes = TOKENIZER.decode(held.latents).clamp(0, 1)
    report = evaluate_generation(
        model(plan), plan, TOKENIZER, held, examples(plan), folder, SETTINGS, volumes=volumes,
        progress=lambda what, done, total: said.append((what, done, total)),
    )  # fmt: skip
    assert all(0 <= done <= total for _, done, total in said)
    assert {"measuring", f"sampling, {OWN}", "sampling, steps"} <= {what for what, _, _ in said}
    return folder, report


def test_every_kind_of_sample_has_its_rows(evaluated: tuple[Path, dict[str, Any]]) -> None:
    rows = evaluated[1]["rows"]
    measures = {
        conditions: {row["measure"] for row in rows if row["told"] == conditions}
        for conditions in (OWN, OTHER, STYLE, NOTHING)
    }
    for conditions in measures:
        assert {
            "Fréchet distance",
            "kernel distance",
            "precision",
            "recall",
            "density",
            "coverage",
        } <= measures[conditions]
    assert {"patient found by content (chance 20%)", "scan generated again: SSIM"} <= measures[OWN]
    assert {"style gap closed", "site asked for, by a probe (chance 50%)"} <= measures[OTHER]
    assert "nearest training over nearest held-out" in measures[NOTHING]


def test_table_and_json_agree(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, report = evaluated[0] / "generation", evaluated[1]
    written = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert written["rows"] == report["rows"]
    with (folder / "quality.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["value"] for row in table] == [
        "" if row["value"] is None else str(row["value"]) for row in report["rows"]
    ]


def test_volumes_lie_on_the_plans_grid_and_are_marked(
    evaluated: tuple[Path, dict[str, Any]], plan: RunPlan
) -> None:
    folder, report = evaluated[0] / "generation", evaluated[1]
    assert report["patient_data"] is True
    assert (folder / "volumes" / "PATIENT_DATA.txt").is_file()
    assert len(report["pictures"]["volumes"]) == 5
    for name in report["pictures"]["volumes"]:
        image = nib.nifti1.Nifti1Image.from_filename(folder / name)
        assert image.shape == plan.volumes.shape
        assert image.header.get_zooms() == pytest.approx(plan.volumes.spacing_mm)
        assert b"patient data" in bytes(image.header["descrip"])


def test_the_pages_part_renders(evaluated: tuple[Path, dict[str, Any]]) -> None:
    part = generation_part(evaluated[0])
    assert part is not None
    environment = Environment(
        loader=FileSystemLoader(Path(generation_page.__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template("page.html").render(generation=part)
    assert page.count("data:image/png;base64,") == 4
    assert "Patient data" in page
    assert "patient found by content" in page


def test_a_folder_without_a_generative_model_has_no_part(tmp_path: Path) -> None:
    assert generation_part(tmp_path) is None


def test_another_sites_style_is_never_the_scans_own(plan: RunPlan) -> None:
    held = held_out(plan)
    asked = requests(model(plan), held, 6)
    assert set(asked) == {OWN, OTHER, CONTENT, STYLE, NOTHING}
    assert all(
        site != held.site[row] for row, site in zip(asked[OTHER].rows, asked[OTHER].sites, strict=True)
    )
    assert {held.site[row] for row in asked[OWN].rows[:2]} == {0, 1}
    assert asked[NOTHING].conditions.content is None
    assert asked[NOTHING].conditions.style is None


def test_what_a_model_cannot_be_told_is_not_asked(plan: RunPlan) -> None:
    assert set(requests(model(plan, bank=False), held_out(plan), 4)) == {OWN, CONTENT, NOTHING}
    assert set(requests(model(plan, ("style",)), held_out(plan), 4)) == {STYLE, NOTHING}
    assert set(requests(model(plan, ("content",)), held_out(plan), 4)) == {CONTENT, NOTHING}


def test_held_out_scans_of_other_sites_only_are_refused(plan: RunPlan) -> None:
    held = dataclasses.replace(held_out(plan), site=(7,) * 10)
    with pytest.raises(ValueError, match="model's sites"):
        usable_rows(model(plan), held)


def test_another_tokenizer_is_refused_before_anything_is_written(plan: RunPlan, tmp_path: Path) -> None:
    other = dataclasses.replace(model(plan), tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match="model's tokenizer"):
        evaluate_generation(other, plan, TOKENIZER, held_out(plan), examples(plan), tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [{"step_counts": (5, 2)}, {"step_counts": (5,)}, {"samples": 3}, {"resamples": 1}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        GenerationSettings(**wrong)
