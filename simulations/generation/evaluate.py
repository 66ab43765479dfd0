"""The evaluation of a generative model: samples, their quality beside real scans, pictures, a few volumes.

Samples with the content of held-out scans in their own and in another site's style, with content alone,
style alone and told nothing; how quality depends on the number of solver steps; what synthetic scans are
worth to a segmenter. Writes `generation/` into the folder of a run: `quality.csv`, `quality.json`, figures,
NIfTI volumes, `viewer.html`. Only a simulation can do this: real scans of several hospitals sit side by side.

Does not do: train. The volumes are handled as the model's training data must be: after raw latents, they are
marked as patient data.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from client.latents.labelled import LabelledScans
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditions import Examples
from meduet_models.sample_quality import frechet_distance, principal_axes
from meduet_models.tokenizer.tokenizer import Tokenizer
from simulations.generation.controls import content_rows, site_row, style_gap_row
from simulations.generation.pictures import Pictures
from simulations.generation.quality import (
    FIXED,
    QualityRow,
    ScanSet,
    distribution_rows,
    diversity_rows,
    fidelity_rows,
    memory_row,
    scan_set,
)
from simulations.generation.samples import (
    NOTHING,
    OTHER,
    OWN,
    STYLE,
    Progress,
    Request,
    Sampler,
    requests,
    site_codes,
    styled_sites,
    told_of,
    usable_rows,
)
from simulations.generation.settings import FOLDER, GenerationSettings
from simulations.generation.use import use_rows
from simulations.hospitals.held_out import Held
from storage.files import private_folder, write_whole

_MOST_PAIRED = 8  # scans whose pairs are compared by MS-SSIM


@dataclass(frozen=True)
class _Drawn:
    """A request with its samples."""

    request: Request
    scans: ScanSet


def evaluate_generation(
    model: GenerativeModel,
    plan: RunPlan,
    tokenizer: Tokenizer,
    held: Held,
    training: Examples,
    folder: Path,
    settings: GenerationSettings,
    *,
    volumes: Float[Tensor, "b 1 D H W"] | None = None,
    labelled: tuple[LabelledScans, LabelledScans] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Sample, measure, draw; write `folder/generation`. Returns what `quality.json` says.

    `held`: scans that trained nothing; `training`: real scans that did. `volumes` are the prepared scans
    behind `held.latents`, for the tokenizer's round trip; `labelled` the labelled scans to train segmenters
    on, and those of other patients to test them on. Raises `ValueError` for a tokenizer that is not the
    model's, and where there is nobody to measure on.
    """
    if tokenizer.sha256 != model.tokenizer_sha256:
        raise ValueError(
            f"Expected the model's tokenizer, {model.tokenizer_sha256[:12]}…; got {tokenizer.sha256[:12]}…."
        )
    target = folder / FOLDER
    private_folder(target)
    conditioner, seed = model.conditioner, plan.seed
    sampler = Sampler(
        model,
        steps=settings.steps,
        solver=settings.solver,
        guidance=settings.guidance,
        seed=seed,
        progress=progress,
    )
    rows = usable_rows(model, held)[: settings.most_real]
    real = scan_set(held.latents[rows], [held.patient[i] for i in rows], conditioner, tokenizer)
    learned = _some(training, settings.most_real, seed)
    known = scan_set(learned.latents, [f"training {i}" for i in range(len(learned))], conditioner, tokenizer)
    drawn: dict[str, _Drawn] = {}
    for kind, request in requests(model, held, settings.samples).items():
        latents = sampler.draw(request, kind)
        drawn[kind] = _Drawn(request, scan_set(latents, request.patient, conditioner, tokenizer))
    progress("measuring", 0, 1)
    table = _distributions(drawn, real, known, settings, seed, model.encoder.latent_deviation.cpu())
    table += _controls(model, tokenizer, held, learned, drawn, settings, seed)
    table += _fidelity(tokenizer, held, drawn, volumes, settings, seed)
    progress("measuring", 1, 1)
    steps = _over_steps(sampler, drawn, real, known, model, tokenizer, settings)
    use = _use(model, labelled, sampler, settings, seed, progress)
    pictures = Pictures(model, plan, tokenizer, held, sampler, settings, target)
    samples = {kind: (one.request, one.scans) for kind, one in drawn.items()}
    drawings = pictures.draw(samples, known, steps["counts"])
    found = {
        "settings": asdict(settings),
        "policy": model.policy,
        "patient_data": model.patient_data,
        "sites": list(model.sites),
        "rows": [_plain(asdict(row)) for row in table + use],
        "steps": steps,
        "seconds_per_volume": sampler.seconds / max(1, sampler.drawn),
        "pictures": drawings,
    }
    write_whole(target / "quality.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_whole(target / "quality.csv", _csv(table + use))
    return found


def _some(training: Examples, count: int, seed: int) -> Examples:
    """At most `count` of them, from every site alike."""
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    place: dict[int, int] = {}
    ranked = []
    for i in order:
        site = int(training.site[i])
        place[site] = place.get(site, 0) + 1
        ranked.append((place[site], i))
    return training.rows(torch.tensor(sorted(i for _, i in sorted(ranked)[:count])))


def _distributions(
    drawn: dict[str, _Drawn],
    real: ScanSet,
    known: ScanSet,
    settings: GenerationSettings,
    seed: int,
    deviation: Tensor,
) -> list[QualityRow]:
    rows: list[QualityRow] = []
    how: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    for kind, one in drawn.items():
        asked_for_held = bool(one.request.rows)  # then anatomy is that of held-out patients
        reference, stand_in = (known, real) if asked_for_held else (real, known)
        rows += distribution_rows(
            one.scans, reference, stand_in, known, kind, neighbours=settings.neighbours, **how
        )
        if not asked_for_held:
            rows.append(memory_row(one.scans, known, real, deviation, kind, **how))
    several = {kind: one.scans for kind, one in drawn.items() if kind != OTHER}
    rows += diversity_rows(several, real, most=_MOST_PAIRED, **how)
    return rows


def _controls(
    model: GenerativeModel,
    tokenizer: Tokenizer,
    held: Held,
    learned: Examples,
    drawn: dict[str, _Drawn],
    settings: GenerationSettings,
    seed: int,
) -> list[QualityRow]:
    rows: list[QualityRow] = []
    conditioner, how = model.conditioner, {"resamples": settings.resamples, "seed": seed}
    of_sites = usable_rows(model, held)
    apart = held.latents[of_sites], [held.site[i] for i in of_sites], [held.patient[i] for i in of_sites]
    for kind, one in drawn.items():
        request, latents = one.request, one.scans.latents
        source = held.latents[list(request.rows)] if request.rows else None
        moved = None  # the scans asked for, through the tokenizer once more; or moved to the style asked for
        if kind == OTHER and model.bank is not None and source is not None:
            own = torch.tensor([held.site[i] for i in request.rows])
            moved = model.bank.restyle(source, own, torch.tensor(request.sites))
        elif source is not None:
            moved = torch.cat(
                [tokenizer.encode(tokenizer.decode(x).clamp(0, 1)) for x in torch.split(source, 16)]
            )
        if source is not None:
            rows += content_rows(conditioner, latents, source, moved, request.patient, kind, **how)
        if request.sites:
            site = site_row(
                conditioner, latents, request.sites, request.patient,
                (learned.latents, learned.site.tolist()), apart, kind, **how,
            )  # fmt: skip
            rows += [] if site is None else [site]
        if kind == OTHER and source is not None:
            asked = site_codes(model, request.sites)
            rows.append(
                style_gap_row(conditioner, latents, source, asked, moved, request.patient, kind, **how)
            )
    return rows


def _fidelity(
    tokenizer: Tokenizer,
    held: Held,
    drawn: dict[str, _Drawn],
    volumes: Tensor | None,
    settings: GenerationSettings,
    seed: int,
) -> list[QualityRow]:
    """Round trip of the tokenizer, and content with own style generated again, against the scans."""
    rows: list[QualityRow] = []
    how: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    chosen = (
        list(drawn[OWN].request.rows) if OWN in drawn else list(range(len(held.site)))[: settings.samples]
    )
    patient = [held.patient[i] for i in chosen]
    decoded = torch.cat([tokenizer.decode(x) for x in torch.split(held.latents[chosen], 16)]).clamp(0, 1)
    truth = decoded if volumes is None else volumes[chosen]
    if volumes is not None:
        rows += fidelity_rows("tokenizer's round trip", decoded, truth, None, patient, "real scans", **how)
    if OWN in drawn:
        floor = None if volumes is None else decoded
        again = drawn[OWN].scans.volumes
        rows += fidelity_rows("scan generated again", again, truth, floor, patient, OWN, **how)
    return rows


def _over_steps(
    sampler: Sampler,
    drawn: dict[str, _Drawn],
    real: ScanSet,
    known: ScanSet,
    model: GenerativeModel,
    tokenizer: Tokenizer,
    settings: GenerationSettings,
) -> dict[str, Any]:
    """The same samples with more and more solver steps: Fréchet distance, and distance to the last."""
    request = drawn.get(STYLE, drawn[NOTHING]).request
    count = min(settings.step_samples, len(request))
    short = Request(
        request.told, request.conditions.each(lambda t: t[:count]), request.rows[:count],
        request.sites[:count], request.patient[:count],
    )  # fmt: skip
    reduce = principal_axes(known.features[FIXED], max(1, min(count, len(real)) // 2))
    reference = reduce(real.features[FIXED])
    distances = []
    for steps in settings.step_counts:
        latents = sampler.draw(short, "steps", steps=steps)
        scans = scan_set(latents, short.patient, model.conditioner, tokenizer)
        distances.append((steps, latents, frechet_distance(reference, reduce(scans.features[FIXED]))))
    last, finest = distances[-1][1], distances[-1][2]
    counts = [
        {
            "steps": steps,
            "frechet": value,
            "relative": value / finest - 1,
            "solver_error": float((latents - last).square().mean().sqrt() / last.std()),
        }
        for steps, latents, value in distances
    ]
    return {"told": short.told, "samples": count, "solver": settings.solver, "counts": counts}


def _use(
    model: GenerativeModel,
    labelled: tuple[LabelledScans, LabelledScans] | None,
    sampler: Sampler,
    settings: GenerationSettings,
    seed: int,
    progress: Progress,
) -> list[QualityRow]:
    names = model.transformer.config.sizes.names
    able = "content" in names and "style" in names and len(styled_sites(model)) > 1
    if labelled is None or settings.use is None or not able or model.bank is None:
        return []

    def render(scans: LabelledScans, asked: Sequence[int], number: int) -> Tensor:
        conditions = told_of(model, scans.latents, ("content", "style"), site_codes(model, asked))
        request = Request(OTHER, conditions, tuple(range(len(scans))), tuple(asked), scans.patient)
        return sampler.draw(request, f"use {number}")

    return use_rows(
        *labelled,
        render,
        model.bank,
        settings.use,
        resamples=settings.resamples,
        seed=seed,
        progress=progress,
    )


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _csv(rows: Sequence[QualityRow]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(QualityRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_plain(asdict(row)) for row in rows)
    return table.getvalue()
