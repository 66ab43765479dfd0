"""A simulated run opened for its audit: every site's part, and the centre's, side by side.

A run that is not finished is audited as far as it came; of a site whose books do not hold, the books are.

What this file does not do: attack (`audit/`), or change the run: an audit has a folder of its own.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from audit.evidence import Evidence, Finetuning
from audit.report import FOLDER
from client.audit import (
    acquired_again,
    cohort_of,
    coins_of,
    labelled_of,
    question_of,
    released,
    site_books,
)
from client.latents.latent_set import LatentSet
from client.site import Site
from federation.plan.plan import RunPlan
from meduet_models.diffusion.artefact import DIFFUSION_MODEL, load_generative_model
from meduet_models.published.pretrained import MODEL, load_pretrained
from meduet_models.tokenizer.tokenizer import load_tokenizer
from meduet_models.weights import sha256_of_file
from privacy.chain import BrokenChain
from server.audit import AGREED, CentresFinetuning, CentresModels
from server.exchanges.finetuning import FINETUNED
from server.public_scans import public_scans
from simulations.finished_run import BegunRun, begun_run
from simulations.progress import Live
from simulations.shadow_models import SHADOWS, shadow_models

MOST_SHADOWS = 4
"""Models that are retrained in a run's place, at most."""


def evidence_of(folder: Path, live: Live, shadows: int = 0) -> Evidence:
    """Open the run in `folder`, and retrain so many models in its place, below its audit. Raises `ValueError`
    when there is no run."""
    missing = [name for name in ("config.yaml", "plan.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"Expected the folder of a run of meduet-simulate; {folder} has no {missing[0]}. Nothing was "
            "audited."
        )
    run = begun_run(folder, live)
    plan, sites = run.plan, _opened(run, live)
    scans: dict[str, LatentSet] = {}
    for name, site in sites.items():
        with live.reading(name) as reading:
            scans[name] = site.scans(plan, reading)
    models, diffusion = CentresModels(plan, folder), folder / DIFFUSION_MODEL
    tokenizer = load_tokenizer(run.settings.tokenizer)
    files = {name: folder / name for name in ("plan.json", MODEL, DIFFUSION_MODEL, "journal.jsonl")}
    books = {name: site_books(run.consortium.state / name) for name in plan.participants}
    files |= {f"checkpoints/{path.name}": path for path in sorted((folder / "checkpoints").glob("round-*"))}
    for name, own in books.items():
        files |= {f"{name}/{path.name}": path for path in (own.journal, own.ledger)}
    for path in sorted(folder.rglob(AGREED)):
        place = path.parent.relative_to(folder)
        files |= {f"{place}/{name}": path.parent / name for name in (AGREED, FINETUNED)}
    retrained = shadow_models(folder, folder / FOLDER / SHADOWS, shadows, live) if shadows else []
    files |= {f"shadow {n}": folder / FOLDER / SHADOWS / f"{n}" / MODEL for n in range(1, shadows + 1)}
    return Evidence(
        name=plan.name,
        plan=plan,
        books=books,
        coins={name: own for site in sites.values() for name, own in coins_of(site, plan).items()},
        releases=[one for name, site in sites.items() for one in released(site, scans[name], plan)],
        cohorts={name: cohort_of(name, own, plan) for name, own in scans.items()},
        hashes={name: sha256_of_file(path) for name, path in files.items() if path.is_file()},
        network_of=models.asked_with,
        before_after=models.before_after,
        question_of=lambda release: question_of(run.consortium.state / release.site, release),
        transformers_of=models.transformers_of,
        finetunings=_finetunings(folder, plan, sites, scans),
        public=_public(plan, folder, run.settings.tokenizer.path),
        model=models.final,
        earlier=models.earlier(),
        shadows=retrained,
        diffusion=load_generative_model(diffusion) if diffusion.is_file() else None,
        tokenizer=tokenizer,
        acquired_again=lambda site: acquired_again(scans[site], plan, tokenizer.encode),
        unfinished=_unfinished(run, models),
        no_weights="The weights under which it was asked are not kept any more: the centre keeps those of "
        "three rounds.",
    )


def _public(plan: RunPlan, folder: Path, tokenizer: str | None) -> Tensor | None:
    if plan.privacy is None:
        return None
    return public_scans(plan, folder, None if tokenizer is None else Path(tokenizer))


def _finetunings(
    folder: Path, plan: RunPlan, sites: Mapping[str, Site], scans: Mapping[str, LatentSet]
) -> dict[str, Finetuning]:
    """The fine-tunings of the run's model that lie below its folder."""
    found = {}
    for path in sorted(folder.rglob(AGREED)) if (folder / MODEL).is_file() else ():
        own = CentresFinetuning(path.parent, load_pretrained(folder / MODEL).network)
        if own.plan.run_sha256 != plan.sha256:  # left by a run that was here before
            continue
        known = {name: labelled_of(site, scans[name], own.plan, plan) for name, site in sites.items()}
        labelled = {name: one for name, one in known.items() if one is not None}
        found[own.plan.sha256] = Finetuning(own.plan, labelled, own.network_after, own.sha256)
    return found


def _opened(run: BegunRun, live: Live) -> dict[str, Site]:
    """The sites of a run whose books hold; of others the books are all that is audited, and the row of the
    books says what is wrong with them."""
    sites = {}
    for name in run.plan.participants:
        try:
            sites[name] = run.consortium.site(name)
        except BrokenChain as error:
            live.say(f"{name}: its books do not hold, and it is not opened. {error}")
    return sites


def _unfinished(run: BegunRun, models: CentresModels) -> str:
    if models.final is not None or run.plan.aggregation.method == "alone":
        return ""
    done = max(models.kept, default=0)
    return (
        f"The run is not finished ({done} of {run.plan.num_rounds} rounds): what was released so far is "
        "audited."
    )
