"""`meduet-simulate --config-name generation`: the cells of the study one after another, each done once.

A curve or a source that is on disk is read and not computed again, if it was made with the same settings.
What this file does not do: compute a cell (`diffusion_study.py`), write the page
(`diffusion_study_report.py`).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from forms.form import build
from forms.json_text import fingerprint_of
from meduet_models.diffusion.artefact import GenerativeModel, save_generative_model
from meduet_models.diffusion.training import validation_loss
from meduet_models.threads import fixed_threads
from meduet_models.weights import sha256_of_tensors
from server.config import plain
from simulations.diffusion_study.report import Curve, write_study
from simulations.diffusion_study.study import Source, Study, StudySettings, cells
from simulations.finished_run import open_run
from simulations.generation.evaluate import evaluate_generation
from simulations.generation.quality import averaged
from simulations.hospitals.held_out import join, own_scans
from simulations.progress import Live
from storage.files import private_folder, write_whole

_RESAMPLES = 200


def run_generation(config: DictConfig) -> Path:
    """Everything from settings to page; returns the page's path.

    Raises `ValueError` for settings that are wrong, and for a folder that holds no finished run.
    """
    values = plain(config)
    names = [field.name for field in dataclasses.fields(StudySettings)]
    asked = build(StudySettings, {name: values[name] for name in names}, "generation")
    with Live() as live:
        opened = open_run(Path(asked.pretrained), live)
        pooled = None if asked.pooled is None else open_run(Path(asked.pooled), live)
        with fixed_threads(opened.settings.engine.cpus_per_site):
            study = Study(asked, opened, pooled)
            curves = _curves(study, live)
            sources = {str(source): _source(study, source, live) for source in asked.sources}
    facts = {
        "settings": dataclasses.asdict(asked),
        "plan_sha256": opened.plan.sha256,
        "encoder_sha256": sha256_of_tensors(opened.pretrained.state_dict()),
        "training_scans": {name: len(own) for name, own in study.patients.by_site.items()},
        "test_scans": len(study.patients.test),
    }
    return write_study(Path(asked.folder), curves, sources, facts)


def _curves(study: Study, live: Live) -> list[Curve]:
    asked = list(cells(study.asked))
    curves = []
    with live.counting("curves") as progress:
        for done, (name, start, given, seed) in enumerate(asked):
            progress(done, len(asked))
            points = _once(
                study,
                f"curves/{name}",
                lambda start=start, given=given, seed=seed: {"points": study.curve(start, given, seed)},  # type: ignore[misc]
            )["points"]
            curves.append(Curve(start, given, seed, [(int(step), float(loss)) for step, loss in points]))
            live.say(f"{name}: loss {points[-1][1]:.4f}")
    return curves


def _source(study: Study, source: Source, live: Live) -> dict[str, Any]:
    def judge() -> dict[str, Any]:
        site = _best_site(study, live) if source == "site" else None
        return {"site": site, **_judged(study, source, site, live)}

    return _once(study, f"sources/{source}", judge)


def _best_site(study: Study, live: Live) -> str:
    """The site whose own model has the lowest loss on all sites' validation patients."""
    losses = {}
    for site in study.opened.plan.sites:
        model = _model(study, "site", site, live)
        loss = validation_loss(
            model.transformer,
            model.conditioner,
            study.patients.validation,
            ("content", "style"),
            style_bank=study.bank,
        )
        losses[site] = float(loss.mean())
    return min(losses, key=losses.__getitem__)


def _model(study: Study, source: Source, site: str | None, live: Live) -> GenerativeModel:
    transformer, plan = study.trained(source, site, live)
    return GenerativeModel(
        transformer=transformer,
        encoder=study.encoder("pooled" if source == "pooled" else "encoder"),
        bank=study.bank,
        sites=plan.sites,
        directions={},
        tokenizer_sha256=plan.tokenizer_sha256,
        volumes=dataclasses.asdict(plan.volumes),
        body_parts=plan.style.body_parts,
        categories=(),
        policy="federated" if source == "federated" else "raw",
        patient_data=source != "federated",
        provenance={"plan_sha256": plan.sha256, "study": source},
    )


def _judged(study: Study, source: Source, site: str | None, live: Live) -> dict[str, Any]:
    model = _model(study, source, site, live)
    folder = study.folder / "sources" / source
    private_folder(folder)
    save_generative_model(folder / "diffusion.safetensors", model)
    opened, plan = study.opened, study.opened.plan
    held = join(
        [
            own_scans(plan, opened.scans[name], index, ("test",))
            for index, name in enumerate(plan.sites)
            if opened.scans[name].indices("test")
        ]
    )
    judged = evaluate_generation(
        model,
        plan,
        opened.consortium.site(plan.sites[0]).tokenizer,
        held,
        study.patients.train,
        folder,
        study.asked.generation,
        labelled=study.labelled,
    )
    losses = validation_loss(
        model.transformer, model.conditioner, study.patients.test, ("content", "style"), style_bank=study.bank
    )
    loss = averaged(losses.double(), [str(i) for i in range(len(losses))], _RESAMPLES, plan.seed)
    return {"rows": judged["rows"], "loss": loss.value, "loss_low": loss.low, "loss_high": loss.high}


def _once(study: Study, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is on disk under this name, if it was made under the same settings; else computed and written."""
    asked = study.asked
    settings = {
        "steps": asked.steps,
        "every": asked.validate_every,
        "diffusion": dataclasses.asdict(asked.diffusion),
    }
    if name.startswith("sources/"):
        settings |= {
            "generation": dataclasses.asdict(asked.generation),
            "rounds": asked.rounds,
            "seed": asked.seeds[0],
        }
    settings |= study.encoder_hashes
    key = fingerprint_of(settings)
    path = study.folder / f"{name}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("key") == key:
            return kept
    with torch.random.fork_rng(devices=[]):
        made = compute()
    write_whole(path, json.dumps({"key": key, **made}, allow_nan=False) + "\n")
    return made
