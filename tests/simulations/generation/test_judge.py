"""Whole simulations with a diffusion model, small: from settings to samples, table, page; and the study."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from meduet_models.diffusion.artefact import load_generative_model
from server.config import compose_config
from simulations.diffusion_study.report import write_study
from simulations.diffusion_study.run import run_generation
from simulations.run import run
from simulations.settings import settings_from
from tests.small_simulation import small_simulation

SMALL = [
    *small_simulation(patients=12, paired=4),
    "site.split_fractions=[0.5,0.25,0.25]",
    "diffusion.transformer.width=24",
    "diffusion.transformer.depth=1",
    "diffusion.transformer.heads=2",
    "diffusion.training.batch_size=4",
    "diffusion.steps_per_round=2",
]
JUDGED = [
    "generation.samples=4", "generation.steps=2", "generation.step_counts=[1,2]",
    "generation.step_samples=4", "generation.most_real=8", "generation.resamples=4",
    "generation.patients=1", "generation.volumes=1", "generation.seeds=1",
]  # fmt: skip


def settings(folder: Path, policy: str, *more: str) -> Any:
    rounds = {
        "raw": ["diffusion.begin_round=2", "diffusion.final_steps=2", *JUDGED],
        "federated": ["diffusion.rounds=2", "generation=none"],
    }
    return compose_config([*SMALL, f"diffusion={policy}", *rounds[policy], *more, f"folder={folder}"])


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "raw"
    run(settings(folder, "raw"))
    return folder


def test_a_run_on_released_latents_is_judged_and_marked(released: Path) -> None:
    model = load_generative_model(released / "diffusion.safetensors")
    assert model.patient_data and model.sites == ("north", "harbour")
    quality = json.loads((released / "generation" / "quality.json").read_text())
    measures = {row["measure"] for row in quality["rows"]}
    assert {"Fréchet distance", "kernel distance", "precision", "recall"} <= measures
    with (released / "generation" / "harmonisation.csv").open(newline="") as stream:
        methods = {row["method"] for row in csv.DictReader(stream)}
    assert {"nothing", "histogram matching", "diffusion, sampled", "diffusion, inverted"} <= methods
    page = (released / "report.html").read_text()
    assert "Generated scans" in page and "Harmonised, against the truth" in page
    assert "patient data" in page and "none of which moved" not in page
    lines = (released / "sites" / "north" / "journal.jsonl").read_text().splitlines()
    left = [r for r in (json.loads(line)["record"] for line in lines) if r.get("kind") == "latents"]
    centre = [json.loads(line)["record"] for line in (released / "journal.jsonl").read_text().splitlines()]
    replies = [r for r in centre if r.get("kind") == "reply" and r["to"] == "query.latents"]
    assert {r["site"] for r in replies} == {"north", "harbour"} and all(r["bytes"] > 0 for r in replies)
    told = [r["sha256"] for r in replies if r["site"] == "north"]
    assert told and told == [r["sha256"] for r in left]  # sealed on the way, the same release in both books


def test_a_run_across_the_sites_releases_no_latent(tmp_path: Path) -> None:
    run(settings(tmp_path / "run", "federated"))
    model = load_generative_model(tmp_path / "run" / "diffusion.safetensors")
    assert not model.patient_data
    assert '"latents"' not in (tmp_path / "run" / "sites" / "north" / "journal.jsonl").read_text()
    assert "Generated scans" not in (tmp_path / "run" / "report.html").read_text()


def test_the_study_compares_starts_and_sources_and_is_done_once(released: Path, tmp_path: Path) -> None:
    asked = [
        f"pretrained={released}", f"folder={tmp_path / 'study'}", "starts=[scratch,encoder]",
        "told=[[style]]", "sources=[raw,site]", "seeds=[1,2]", "steps=2", "rounds=1", "validate_every=1",
        *[word for word in SMALL if word.startswith("diffusion.t")], *JUDGED,
    ]  # fmt: skip
    page = run_generation(compose_config(asked, "generation"))
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [(c["start"], c["seed"]) for c in study["curves"]] == [
        ("scratch", 1), ("scratch", 2), ("encoder", 1), ("encoder", 2),
    ]  # fmt: skip
    assert all([step for step, _ in curve["points"]] == [0, 1, 2] for curve in study["curves"])
    assert set(study["sources"]) == {"raw", "site"} and study["sources"]["site"]["site"] in (
        "north",
        "harbour",
    )
    assert "steps until scratch" in page.read_text()
    cell = tmp_path / "study" / "curves" / "scratch-style-1.json"
    written = cell.stat().st_mtime_ns
    run_generation(compose_config(asked, "generation"))
    assert cell.stat().st_mtime_ns == written


def test_what_has_no_effect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generation has no effect"):
        settings_from({**compose_config([f"folder={tmp_path}"]), "generation": {}})


def test_a_study_of_sources_alone_has_a_page_too(tmp_path: Path) -> None:
    page = write_study(tmp_path, [], {}, {"settings": {}})
    assert "How fast it learns" not in page.read_text()
    assert json.loads((tmp_path / "study.json").read_text())["curves"] == []
