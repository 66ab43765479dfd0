"""A simulated run opened for its audit: everybody's scans, what left, the books, the published models.

What left is read from what the sites kept of it (`client/answers.py`), and of latents, which are not kept,
made again by the site's own functions; either must have the hash of the journal's line, else it is not
attacked and the report says why. A run that is not finished is audited as far as it came.

What this file does not do: attack (`audit/`), or write anything into the run but an audit's own folder.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audit.evidence import Cohort, Evidence, Release, SiteBooks
from client.answers import ANSWERS, KeptAnswers
from client.exchanges.latents import raw_items
from client.exchanges.probes import target_of
from client.latents.examples import examples_of
from client.latents.latent_set import LatentSet
from client.site import Site
from federation.exchanges.latents import BOUNDED, latent_bound, to_tensors
from federation.journal import BrokenChain, read_journal
from federation.plan import RunPlan
from federation.wire import GROWTH, rounded
from meduet_models.diffusion.artefact import load_generative_model
from meduet_models.meduet import FactorNetwork, MeDUET
from meduet_models.tokenizer.tokenizer import load_tokenizer
from meduet_models.weights import load_weights, sha256_of_file, sha256_of_tensors
from privacy.clipping import clip
from privacy.ledger import Place
from server.app import DIFFUSION_MODEL, MODEL
from server.checkpoints import Checkpoint, Checkpoints
from server.model import MeduetModel
from simulations.finished_run import BegunRun, begun_run
from simulations.progress import Live

_SCANS_AT_ONCE = 64
_SHIFT, _GAMMA, _NOISE = 1, 1.2, 0.02
"""How a scan is acquired again: moved by a voxel, another gamma, noise."""


def evidence_of(folder: Path, live: Live) -> Evidence:
    """Open the run in `folder`. Raises `ValueError` when there is none."""
    missing = [name for name in ("config.yaml", "plan.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"Expected the folder of a run of meduet-simulate; {folder} has no {missing[0]}. Nothing was "
            "audited."
        )
    run = begun_run(folder, live)
    plan, consortium = run.plan, run.consortium
    sites = _opened(run, live)
    scans: dict[str, LatentSet] = {}
    for name, site in sites.items():
        with live.reading(name) as reading:
            scans[name] = site.scans(plan, reading)
    weights = _Weights(plan, Checkpoints(folder / "checkpoints", plan.sha256), folder)
    diffusion = folder / DIFFUSION_MODEL
    tokenizer = load_tokenizer(run.settings.tokenizer)
    releases = [r for name, site in sites.items() for r in _released(site, scans[name], plan)]
    return Evidence(
        name=plan.name,
        plan=plan,
        books={
            name: SiteBooks(folder / "journal.jsonl", folder / "ledger.jsonl")
            for name in plan.participants
            for folder in [consortium.state / name]
        },
        releases=releases,
        cohorts={name: _cohort(name, own, plan) for name, own in scans.items()},
        hashes=_hashes(folder, sites),
        network_of=weights.asked_with,
        before_after=weights.before_after,
        model=weights.final,
        earlier=weights.earlier(),
        diffusion=load_generative_model(diffusion) if diffusion.is_file() else None,
        tokenizer=tokenizer,
        acquired_again=lambda site: _acquired_again(scans[site], plan, tokenizer.encode),
        unfinished="" if weights.final or plan.aggregation.method == "alone" else _unfinished(run, weights),
    )


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


def _unfinished(run: BegunRun, weights: "_Weights") -> str:
    done = max(weights.kept, default=0)
    return (
        f"The run is not finished ({done} of {run.plan.training.rounds} rounds): what was released so far is "
        "audited."
    )


def _cohort(name: str, scans: LatentSet, plan: RunPlan) -> Cohort:
    rows = range(scans.num_scans)
    chunks = [rows[first : first + _SCANS_AT_ONCE] for first in range(0, len(rows), _SCANS_AT_ONCE)]
    latents = torch.cat([scans.latents(list(chunk)) for chunk in chunks])
    measured = None
    if targets := list(plan.probes.anatomy):
        measured = torch.tensor([[target_of(scans, row, one, plan) for one in targets] for row in rows])
    took_part = tuple(split == "train" for split in scans.splits)
    return Cohort(name, latents, tuple(scans.patients), took_part, measured)


def _released(site: Site, scans: LatentSet, plan: RunPlan) -> Iterator[Release]:
    """What left a site, in the order of its journal; a broken one tells nothing here, and `books` says so."""
    try:
        lines = [e.record for e in read_journal(site.state_dir / "journal.jsonl") if "sha256" in e.record]
    except (BrokenChain, ValueError):
        return
    kept = KeptAnswers(site.state_dir / ANSWERS)
    for line in lines:
        rows: tuple[int, ...] = ()
        if line["kind"] == "latents":
            rows = _rows_of(site, scans, plan, line)
            tensors = _latents_again(scans, plan, line, rows)
            missing = "" if tensors else "Latents made again have another hash: scans changed since."
        else:
            answer = kept.read(_place(line), line["sha256"])
            tensors = None if answer is None else dict(answer.tensors)
            missing = "" if tensors else "The answer is not kept any more: sites keep those of three rounds."
        yield Release(site.name, line, tensors, missing, rows)


def _rows_of(site: Site, scans: LatentSet, plan: RunPlan, line: Mapping[str, Any]) -> tuple[int, ...]:
    """Which scans a release of latents was of."""
    first, count = line["counts"]["first_item"], len(line["items"])
    return tuple(raw_items(scans, plan, line["round"], site.secret)[first : first + count])


def _place(line: Mapping[str, Any]) -> Place:
    return Place(
        plan_sha256=line["plan"], kind=line["kind"], round=line["round"], part=str(line.get("part", ""))
    )


def _latents_again(
    scans: LatentSet, plan: RunPlan, line: Mapping[str, Any], rows: tuple[int, ...]
) -> dict[str, Tensor] | None:
    """Released latents as the site's own functions make them; None when they have another hash."""
    if not rows:
        return None
    tensors, dtype = to_tensors(examples_of(scans, rows, plan)), plan.release.latent_dtype
    bound = latent_bound(plan) * (1 - GROWTH[dtype])
    tensors[BOUNDED] = torch.stack([clip({BOUNDED: one}, bound).value[BOUNDED] for one in tensors[BOUNDED]])
    leaving = {name: rounded(tensor, dtype) for name, tensor in tensors.items()}
    return leaving if sha256_of_tensors(leaving) == line["sha256"] else None


@torch.no_grad()
def _acquired_again(
    scans: LatentSet, plan: RunPlan, encode: Callable[[Tensor], Tensor]
) -> Float[Tensor, "n c d h w"] | None:
    """Latents of the same scans as another acquisition would give them; None for whole scans."""
    if plan.volumes.extent != "crop":
        return None
    volumes = scans.volumes(range(scans.num_scans), plan.volumes).float()
    noise = torch.randn(volumes.shape, generator=torch.Generator().manual_seed(0))
    moved = volumes.roll((_SHIFT, _SHIFT, _SHIFT), (2, 3, 4)).clamp(0, 1) ** _GAMMA
    return torch.cat([encode(chunk) for chunk in torch.split((moved + _NOISE * noise).clamp(0, 1), 16)])


def _hashes(folder: Path, sites: Mapping[str, Site]) -> dict[str, str]:
    files = {name: folder / name for name in ("plan.json", MODEL, DIFFUSION_MODEL, "journal.jsonl")}
    for name, site in sites.items():
        files |= {f"{name}/{book}.jsonl": site.state_dir / f"{book}.jsonl" for book in ("journal", "ledger")}
    return {name: sha256_of_file(path) for name, path in files.items() if path.is_file()}


class _Weights:
    """The models of a run, as the centre knows them: a style branch that stays at sites is as it started."""

    def __init__(self, plan: RunPlan, checkpoints: Checkpoints, folder: Path) -> None:
        self.plan = plan
        self.kept: dict[int, Checkpoint] = {r: checkpoints.load(r) for r in checkpoints.rounds()}
        self._model = MeduetModel(plan)
        self._coded: dict[int, dict[str, Tensor]] = {}
        path = folder / MODEL
        self._final = load_weights(path)[0] if path.is_file() else {}

    @property
    def final(self) -> FactorNetwork | None:
        """The published model."""
        return self._network(self._final) if self._final else None

    def earlier(self) -> dict[str, FactorNetwork]:
        """The common start on the final latent scale, and the model of the earliest round that is kept."""
        if not self._final:
            return {}
        start = self._model.start()[0]
        constants = {n: self._final[n] for n in ("latent_mean", "latent_deviation")}
        models = {"the common start": self._network(start | constants)}
        early = [r for r in self.kept if 0 < r < self.plan.training.rounds]
        if early:
            models[f"round {min(early)}"] = self._network(self.kept[min(early)].shared)
        return models

    def asked_with(self, release: Release) -> FactorNetwork | None:
        """The weights that came with a question of codes."""
        last = self.plan.training.rounds
        if release.kind == "probe" and release.round == last + 1 and self._final:
            return self._network(self._final)
        checkpoint = self.kept.get(min(release.round, last))
        if checkpoint is None:
            return None
        if checkpoint.round not in self._coded:
            self._coded[checkpoint.round] = self._model.with_code(checkpoint.shared, checkpoint.bank)
        return self._network(self._coded[checkpoint.round])

    def before_after(self, release: Release) -> tuple[FactorNetwork, FactorNetwork] | None:
        """The model that was sent for a round, and the same moved by a site's mean update."""
        sent, update = self.kept.get(release.round - 1), release.tensors
        if sent is None or update is None:
            return None
        weight = float(release.record["weight"])
        moved = {n: t + update[n] / weight if n in update else t for n, t in sent.shared.items()}
        return self._network(sent.shared), self._network(moved)

    def _network(self, shared: Mapping[str, Tensor]) -> FactorNetwork:
        network = MeDUET(self.plan.network, len(self.plan.sites), seed=self.plan.seed)
        own = network.state_dict()
        network.load_state_dict(own | {n: t for n, t in shared.items() if n in own})
        return network.eval().requires_grad_(False)
