"""A site's part of an audit: its scans as candidates, what left it as it left, its books.

What left is read from what the site kept of it (`client/books/answers.py`), and of latents, which are not
kept, made again by the site's own functions; either must have the hash of the journal's line, else it is not
attacked and the report says why. At a site everything stays there: the report is patient data of a kind.

What this file does not do: attack (`audit/`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audit.cohort import Cohort
from audit.evidence import Evidence, Labelled, Release, SiteBooks
from client.books.answers import ANSWERS, KeptAnswers
from client.books.books import JOURNAL, LEDGER
from client.exchanges.latent_moments import question_path
from client.exchanges.latents import raw_items
from client.exchanges.probes import target_of
from client.latents.batches import Batches, step_generator
from client.latents.examples import examples_of
from client.latents.labelled import LabelledScans, NoLabels, labelled_scans
from client.latents.latent_set import LatentSet
from client.latents.public_scans import kept_public
from client.release import clipped_rows
from client.secrets.site_secret import seed_of
from client.settings import ceiling_of
from client.site import Site
from client.training.trainee import student_of
from federation.canaries import Kind, coins
from federation.exchanges.finetuning import FinetunePlan
from federation.exchanges.latents import BOUNDED, latent_bound, to_tensors
from federation.journal import read_journal
from federation.plan.plan import RunPlan
from federation.wire.wire import GROWTH, rounded
from meduet_models.published.pretrained import MODEL, load_pretrained
from meduet_models.weights import load_weights, sha256_of_file, sha256_of_tensors
from privacy.ledger import Place

_SCANS_AT_ONCE = 64
_YEARS = 20
_SHIFT, _GAMMA, _NOISE = 1, 1.2, 0.02
"""How a scan is acquired again: moved by a voxel, another gamma, noise."""


def evidence_of_site(site: Site, scans: LatentSet, plan: RunPlan, model: Path | None) -> Evidence:
    """All that a site can audit by itself. `model`: the published model, if it is there; raises `ValueError`
    when that is another plan's."""
    network, asked, hashes, tokenizer = None, None, _hashes(site), site.tokenizer
    if model is not None:
        pretrained = load_pretrained(model)
        if pretrained.provenance.get("plan_sha256") != plan.sha256:
            raise ValueError(f"Expected a model of plan {plan.sha256[:12]}…; {model.name} is of another.")
        network = pretrained.network.requires_grad_(False)
        asked = student_of(plan, load_weights(model)[0], None).eval()
        hashes[MODEL] = sha256_of_file(model)
    return Evidence(
        name=f"{plan.name}, seen by {site.name}",
        plan=plan,
        coins=coins_of(site, plan),
        public=None if plan.audit_canaries is None else kept_public(site.state_dir, plan),
        books={site.name: replace(site_books(site.state_dir), ceiling=ceiling_of(site.config))},
        releases=list(released(site, scans, plan)),
        cohorts={site.name: cohort_of(site.name, scans, plan)},
        hashes=hashes,
        network_of=lambda release: asked if release.kind == "audit_counts" else None,
        question_of=lambda release: question_of(site.state_dir, release),
        model=network,
        acquired_again=lambda _: acquired_again(scans, plan, tokenizer.encode),
        tokenizer=tokenizer,
        no_weights="The weights that came with this question are not kept at a site; the centre has them.",
    )


def coins_of(site: Site, plan: RunPlan) -> dict[str, dict[str, tuple[bool, ...]]]:
    """Which canaries of a plan are in at this site: read for its audit, and told to nobody else."""
    if plan.audit_canaries is None:
        return {}
    kinds: tuple[Kind, ...] = ("style_code", "steps", "inputs")
    return {site.name: {kind: coins(site.secret, plan, kind) for kind in kinds}}


def site_books(state_dir: Path) -> SiteBooks:
    """Where they lie."""
    return SiteBooks(state_dir / JOURNAL, state_dir / LEDGER)


def _hashes(site: Site) -> dict[str, str]:
    """sha256 of each, by the name in the report."""
    own = site_books(site.state_dir)
    return {f"{site.name}/{path.name}": sha256_of_file(path) for path in (own.journal, own.ledger)}


def cohort_of(name: str, scans: LatentSet, plan: RunPlan) -> Cohort:
    """Everybody of whom there are scans; of whole scans, their central crops."""
    rows = range(scans.num_scans)
    chunks = [rows[first : first + _SCANS_AT_ONCE] for first in range(0, len(rows), _SCANS_AT_ONCE)]
    latents = torch.cat([scans.latents(list(chunk)) for chunk in chunks])
    measured = None
    if targets := list(plan.probes.anatomy):
        measured = torch.tensor([[target_of(scans, row, one, plan) for one in targets] for row in rows])
    took_part = tuple(split == "train" for split in scans.splits)
    known = tuple(dict(one) for one in scans.covariates)
    return Cohort(name, latents, tuple(scans.patients), took_part, measured, _groups(scans), known)


def labelled_of(site: Site, scans: LatentSet, finetuning: FinetunePlan, plan: RunPlan) -> Labelled | None:
    """Everybody whose answer is known to a fine-tuning; who took part is whose labels this site used. None
    where nobody's is."""
    local = finetuning.local
    rows = {split: scans.indices(split) for split in ("train", "validation", "test")}

    def known(some: Sequence[int]) -> LabelledScans:
        volumes = plan.volumes if local.sees_volumes else None
        return labelled_scans(scans, some, local, finetuning.target, finetuning.target_values, volumes)

    try:
        everybody, trained = known([row for own in rows.values() for row in own]), known(rows["train"])
    except NoLabels:
        return None
    used = set(trained.share(finetuning.label_share, seed_of(site.secret, "labels", finetuning.seed)).patient)
    seen = (everybody.latents,) if everybody.volumes is None else (everybody.volumes, everybody.latents)
    people = everybody.patient
    cohort = Cohort(site.name, everybody.latents, people, tuple(one in used for one in people))
    return Labelled(cohort, seen if local.network != "volume_unet" else seen[:1], everybody.answers)


def _groups(scans: LatentSet) -> dict[str, tuple[str, ...]]:
    """Sex and age band of each scan's patient, where the site knows them."""
    known = [dict(one) for one in scans.covariates]
    groups = {
        "sex": tuple(str(one.get("sex", "")) for one in known),
        "age": tuple(_band(one.get("age")) for one in known),
    }
    return {name: values for name, values in groups.items() if any(values)}


def _band(age: str | float | None) -> str:
    """Twenty years; empty text where the age is not known as a number."""
    if not isinstance(age, int | float) or not math.isfinite(age):
        return ""
    first = int(age // _YEARS) * _YEARS
    return f"{first} to {first + _YEARS - 1}"


def released(site: Site, scans: LatentSet, plan: RunPlan) -> Iterator[Release]:
    """What left the site under this plan, in the order of its journal."""
    lines = [e.record for e in read_journal(site.state_dir / JOURNAL) if "sha256" in e.record]
    kept = KeptAnswers(site.state_dir / ANSWERS)
    for line in lines:
        if line["kind"] != "latents":
            answer = kept.read(_place(line), line["sha256"])
            tensors = None if answer is None else dict(answer.tensors)
            missing = "" if tensors else "The answer is not kept any more: sites keep those of three rounds."
            drawn = _drawn(site, scans, plan, line) if tensors and line["kind"] == "round" else ()
            yield Release(site.name, line, tensors, missing, drawn)
        elif line["plan"] == plan.sha256:
            rows = _rows_of(site, scans, plan, line)
            tensors = _latents_again(scans, plan, line, rows)
            missing = "" if tensors else "Latents made again have another hash: scans changed since."
            yield Release(site.name, line, tensors, missing, rows)
        else:
            yield Release(site.name, line, None, "Latents of another plan: audit them under that.")


def question_of(state_dir: Path, release: Release) -> dict[str, Tensor] | None:
    """What came with a question of moments, as the site that answered kept it; None where it is gone."""
    path = question_path(state_dir, str(release.record["plan"]))
    return load_weights(path)[0] if path.is_file() else None


@torch.no_grad()
def acquired_again(
    scans: LatentSet, plan: RunPlan, encode: Callable[[Tensor], Tensor]
) -> Float[Tensor, "n c d h w"] | None:
    """Latents of the same scans as another acquisition would give them; None for whole scans."""
    if plan.volumes.extent != "crop":
        return None
    volumes = scans.volumes(range(scans.num_scans), plan.volumes).float()
    noise = torch.randn(volumes.shape, generator=torch.Generator().manual_seed(0))
    moved = volumes.roll((_SHIFT, _SHIFT, _SHIFT), (2, 3, 4)).clamp(0, 1) ** _GAMMA
    return torch.cat([encode(chunk) for chunk in torch.split((moved + _NOISE * noise).clamp(0, 1), 16)])


def _place(line: Mapping[str, Any]) -> Place:
    return Place(
        plan_sha256=line["plan"], kind=line["kind"], round=line["round"], part=str(line.get("part", ""))
    )


def _rows_of(site: Site, scans: LatentSet, plan: RunPlan, line: Mapping[str, Any]) -> tuple[int, ...]:
    """Which scans a release of latents was of."""
    first, count = line["counts"]["first_item"], len(line["items"])
    return tuple(raw_items(scans, plan, line["round"], site.secret)[first : first + count])


def _drawn(site: Site, scans: LatentSet, plan: RunPlan, line: Mapping[str, Any]) -> tuple[int, ...]:
    """Which scans the steps of a round drew, from the site's own secret; of another plan, none is known."""
    if line["plan"] != plan.sha256:
        return ()
    batches, steps = Batches(scans, plan, None), range(plan.training.steps_per_round)
    each = [batches.draw(step_generator(site.secret, plan.seed, line["round"], step)).scans for step in steps]
    return tuple(sorted(set(torch.cat(each).tolist())))


def _latents_again(
    scans: LatentSet, plan: RunPlan, line: Mapping[str, Any], rows: tuple[int, ...]
) -> dict[str, Tensor] | None:
    """Released latents as the site's own functions make them; None when they have another hash."""
    if not rows:
        return None
    tensors, dtype = to_tensors(examples_of(scans, rows, plan)), plan.release.latent_dtype
    bound = latent_bound(plan) * (1 - GROWTH[dtype])
    tensors |= clipped_rows({BOUNDED: tensors[BOUNDED]}, bound)
    leaving = {name: rounded(tensor, dtype) for name, tensor in tensors.items()}
    return leaving if sha256_of_tensors(leaving) == line["sha256"] else None
