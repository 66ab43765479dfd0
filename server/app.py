"""The centre: survey, rounds, probes, erasure; a run that is stopped anywhere goes on to the same weights.

Phases: (0) every site tells the sums that describe its scans' appearance, from which come the latent scale
and the style bank; (1 to R) rounds of `strategies/content_share.py`, or secure sums
(`server/exchanges/secure_sum.py`), every few of them followed by federated probes
(`server/exchanges/probes.py`), which train nothing and stop nothing; (R + 1) every site tells the sums of
its patients' content codes and pooled content, from which comes the site erasure; then, where the plan asks,
counts of its own audit of the final weights (`server/exchanges/audit_counts.py`); (R + 2) the diffusion
model is trained at the sites, or finished, where the centre has trained it on released latents while the
rounds ran (`server/exchanges/diffusion.py`). With privacy the sites are asked for a style with noise, and the
rounds happen at the centre (`server/protected_pretraining.py`); a plan may have rounds of noisy steps at the
sites after them (`server/exchanges/private_rounds.py`). After each phase and round
everything is on disk before anything else is asked. A run that is started again goes on after its last
checkpoint; sites answer a round that is asked twice in the same way, so on one kind of machine the final
weights are the same bits. What this file does not do: it trains nothing itself, sees no scan, and averages
nothing.

`run` takes any Flower grid; `server/server_app.py` is the ServerApp of a deployment.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.x509 import Certificate
from flwr.serverapp import Grid

from federation.journal import Journal
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Tensors
from forms.json_text import sha256_of
from meduet_models.diffusion.artefact import DIFFUSION_MODEL
from meduet_models.published.expiry import EXPIRES, check_unexpired
from meduet_models.published.pretrained import MODEL
from meduet_models.weights import load_weights, save_weights, sha256_of_tensors
from server.checkpoints import Checkpoint, Checkpoints, early_rounds
from server.exchanges import audit_counts
from server.exchanges.demographics import ask_demographics
from server.exchanges.diffusion import diffusion_of, save_diffusion
from server.exchanges.erasure import ask_erasure
from server.exchanges.pretraining import pretraining
from server.exchanges.private_rounds import parted, private_rounds
from server.exchanges.probes import FederatedProbes
from server.exchanges.secure_sum import SecureSums
from server.exchanges.survey import ask_survey
from server.export.crate import write_run_crate
from server.latent_bank.records import key_beside
from server.model import MeduetModel, SharedModel
from server.observer import RoundObserver
from server.protected_pretraining import ProtectedPretraining
from server.run_folder import claim, write_metrics
from storage.files import write_whole
from strategies.content_share import ContentShare
from strategies.quorum import Roster, SiteOf

_CPU = torch.device("cpu")

_log = logging.getLogger(__name__)


class RunObserver(RoundObserver):
    """Told what happens in a whole run; this one does nothing."""

    def on_survey(self, summary: Mapping[str, Any], style_bank: Mapping[str, Any]) -> None:
        """The survey is done: who told what, and the style bank's tensors."""

    def on_diffusion(self, done: int, total: int, loss: float) -> None:
        """After the last round the diffusion model is trained on: steps (or rounds) done, in all, loss."""

    def on_end(self, result: "RunResult") -> Mapping[str, Any]:
        """The run is complete, now or already before. What is returned becomes the metrics' "final"."""
        return {}


@dataclass(frozen=True)
class RunResult:
    """A complete run."""

    shared: Tensors
    """Final shared weights; empty when each site is alone."""
    bank: Tensors
    metrics: dict[str, Any]
    """What `metrics.json` holds."""
    model: Path | None
    """The file of the final weights; None when nothing is shared."""
    diffusion: Path | None = None
    """The file of the diffusion model; None when the plan has none."""


def run(
    grid: Grid,
    plan: RunPlan,
    folder: Path,
    *,
    model: SharedModel | None = None,
    observer: RunObserver | None = None,
    resume: bool = True,
    device: torch.device = _CPU,
    bank_key: Path | None = None,
    site_of: SiteOf | None = None,
    authority: Certificate | None = None,
    keep_early: bool = False,
) -> RunResult:
    """Run `plan` in `folder`, or go on with what is there.

    `site_of` says which site a node is registered as; none: as in a simulation. `authority` certified the
    sites' keys: with it the centre checks what sites sign for a secure sum. `keep_early`: whether the
    checkpoints of the run's start and middle stay, which an audit compares with.
    A central diffusion model is trained on `device`, on latents that are encrypted with the key in the file
    `bank_key`; none: beside the run's folder, `<folder>.key`, made at first use.
    Raises `RoundFailed` below the quorum (the last checkpoint stays), `OtherPlan` when the folder is another
    plan's, and `ValueError` when it holds a run and `resume` is false, or the plan has expired.
    """
    check_unexpired(plan.release.expires, "a plan")
    made = _Run(
        grid,
        plan,
        folder,
        model or MeduetModel(plan),
        observer or RunObserver(),
        site_of,
        authority,
        keep_early,
    )
    return made.complete(resume, device, bank_key or key_beside(folder))


class _Run:
    """One run from wherever it is to its end."""

    def __init__(
        self,
        grid: Grid,
        plan: RunPlan,
        folder: Path,
        model: SharedModel,
        observer: RunObserver,
        site_of: SiteOf | None,
        authority: Certificate | None,
        keep_early: bool,
    ) -> None:
        self.grid, self.plan, self.folder, self.model, self.observer = grid, plan, folder, model, observer
        self.roster, self.authority = Roster(plan.participants, site_of), authority
        early = early_rounds(plan.num_rounds) if keep_early else ()
        self.checkpoints = Checkpoints(folder / "checkpoints", plan.sha256, early)
        self.book = ReplyBook()
        self.probes = FederatedProbes(grid, self.roster, plan, self.book)

    def complete(self, resume: bool, device: torch.device, bank_key: Path) -> RunResult:
        claim(self.folder, self.plan)
        self.journal = self.book.journal = Journal(self.folder / "journal.jsonl")
        self.diffusion = diffusion_of(
            self.grid,
            self.roster,
            self.plan,
            self.folder / "diffusion",
            device,
            bank_key,
            self.book,
            self.observer.on_diffusion,
            lambda: self.model.public_scans(self.folder),
        )
        self.protected = (
            None
            if self.plan.privacy is None
            else ProtectedPretraining(
                self.grid, self.roster, self.plan, self.folder, self.model, device, self.book
            )
        )
        last = self.checkpoints.latest()
        if last is not None and not resume:
            raise ValueError(
                f"Expected no checkpoints in {self.folder}; it holds a run up to round {last.round}. "
                "Resume it, or remove the folder."
            )
        damaged = {"damaged_checkpoints": self.checkpoints.damaged} if self.checkpoints.damaged else {}
        self._note("start" if last is None else "resume", round=0 if last is None else last.round, **damaged)
        if last is None:
            last = self._survey()
        if self.protected is not None:
            last = self._protected_rounds(self.protected, last)
        last = self._rounds(last)
        result = self._generative(self._counted(self._final(last)))
        final = self.observer.on_end(result)
        result = dataclasses.replace(result, metrics=result.metrics | {"final": dict(final)})
        write_metrics(self.folder, result.metrics)
        write_run_crate(self.folder)
        return result

    def _survey(self) -> Checkpoint:
        shared, _ = self.model.start()
        metrics: dict[str, Any] = {"rounds": [], "survey": {}, "erasure": {}}
        style_bank: Tensors = {}
        if self.protected is not None:
            style_bank, metrics["survey"] = self.protected.survey()
            survey = metrics["survey"]
            self._note("style_code", sites=list(survey["sites"]), refused=survey["refused"])
        elif self.model.surveyed:
            replies, refused = ask_survey(
                self.grid, self.roster, self.plan, self.model.check_survey, self.book
            )
            surveyed = self.model.after_survey(shared, replies)
            shared, style_bank = surveyed.shared, surveyed.bank
            metrics["survey"] = {**surveyed.summary, "refused": refused}
            self._note("survey", sites=list(replies), refused=refused)
        if self.plan.demographics is not None:
            total, told, refused = ask_demographics(self.grid, self.roster, self.plan, self.book)
            metrics["demographics"] = {**total, "sites": len(told), "refused": refused}
            self._note("demographics", sites=told, refused=refused)
        checkpoint = self._save(0, shared, {}, style_bank, metrics)
        self.observer.on_survey(metrics["survey"], style_bank)
        return checkpoint

    def _rounds(self, last: Checkpoint) -> Checkpoint:
        num_rounds = self.plan.num_rounds
        if last.round >= num_rounds:
            return last
        strategy = self._strategy(last)
        at_centre = self.protected is not None and last.round == self.plan.training.rounds
        strategy.optimiser.load({} if at_centre else last.optimiser)
        strategy.summary()
        rounds = strategy.rounds(self.grid, done=last.round)
        for round_number in range(last.round + 1, num_rounds + 1):
            self.observer.on_round_start(round_number, num_rounds)
            released = self.diffusion.before_round(round_number, last.shared, last.bank)
            report = dataclasses.asdict(next(rounds))
            shared = last.shared | strategy.shared  # what did not travel is as it was
            trained = self.diffusion.after_round(round_number)
            if released or trained:
                report["diffusion"] = {"released": released, **trained}
            probes = self.observer.on_round_end(round_number, shared, report)
            report |= {"probes": dict(probes)} if probes else {}
            if self.probes.due(round_number):
                coded = self.model.with_code(shared, last.bank)
                report["federated_probes"] = self.probes.read(round_number, coded, last.bank)
            metrics = last.metrics | {"rounds": [*last.metrics["rounds"], report]}
            moments = strategy.optimiser.state()
            last = self._save(round_number, shared, moments, last.bank, metrics, last.home)
            self._note(
                "round",
                round=round_number,
                sites=list(report["sites"]),
                refused=report["refused"],
                loss=report["loss"],
                **({"burnt": report["burnt"]} if report.get("burnt") else {}),
            )
        return last

    def _strategy(self, last: Checkpoint) -> ContentShare | SecureSums:
        plan, home = self.plan, self.model.start()[1]
        shown: dict[str, Any] = {
            "roster": self.roster,
            "folder": self.folder,
            "book": self.book,
            "on_reply": self.observer.on_site_reply,
        }
        if self.protected is not None:
            travels, stays = parted(plan, last.home | last.shared)
            public = self.protected.public
            if plan.aggregation.secure_sum:
                return SecureSums(
                    plan, travels, last.bank, stays, public=public, authority=self.authority, **shown
                )
            task = private_rounds(plan, last.bank, stays, public)
            return ContentShare(plan, travels, task, **shown)
        if plan.aggregation.secure_sum:
            return SecureSums(plan, last.shared, last.bank, home, authority=self.authority, **shown)
        return ContentShare(plan, last.shared, pretraining(plan, last.bank, home), **shown)

    def _protected_rounds(self, protected: ProtectedPretraining, last: Checkpoint) -> Checkpoint:
        """The rounds of a plan with privacy at the centre, in which no site is asked anything."""
        shared, rounds = set(self.model.start()[0]), range(last.round + 1, self.plan.training.rounds + 1)
        steps = protected.rounds(last)
        for round_number in rounds:
            self.observer.on_round_start(round_number, self.plan.num_rounds)
            report, weights, state = next(steps)
            travels = {name: tensor for name, tensor in weights.items() if name in shared}
            stays = {name: tensor for name, tensor in weights.items() if name not in shared}
            probes = self.observer.on_round_end(round_number, travels, report)
            report |= {"probes": dict(probes)} if probes else {}
            metrics = last.metrics | {"rounds": [*last.metrics["rounds"], report]}
            last = self._save(round_number, travels, state, last.bank, metrics, stays)
            self._note("round", round=last.round, sites=[], refused={}, loss=report["loss"])
        return last

    def _final(self, last: Checkpoint) -> RunResult:
        path = self.folder / MODEL
        if not last.shared:
            return RunResult({}, last.bank, last.metrics, None)
        if (done := self._finished(path)) is not None:
            shared, kept = done
            return RunResult(shared, last.bank, last.metrics | kept, path)
        shared, erasure = self._erased(last)
        metrics: dict[str, Any] = {"erasure": erasure}
        if "demographics" in last.metrics:
            metrics["demographics"] = last.metrics["demographics"]
        if self.probes.due(last.round):
            erased = bool(erasure) and "skipped" not in erasure
            coded = shared if erased else self.model.with_code(shared, last.bank)
            metrics["federated_probes"] = self.probes.read(last.round + erased, coded, last.bank, erased)
            metrics["directions"] = {name: one.tolist() for name, one in self.probes.directions.items()}
            if erased:  # the code that the readers read is in the final weights
                readers = self.probes.readers.items()
                metrics["readers"] = {name: dataclasses.asdict(one) for name, one in readers}
        sha256 = sha256_of_tensors(shared)
        provenance = {
            **self.model.provenance(),
            "plan_sha256": self.plan.sha256,
            "plan": self.plan.to_json(),
            "rounds": str(last.round),
            EXPIRES: self.plan.release.expires,
            **{name: json.dumps(what, sort_keys=True) for name, what in metrics.items()},
            "tensors_sha256": sha256,
        }
        save_weights(path, shared, provenance)
        self._note("end", tensors_sha256=sha256)
        return RunResult(shared, last.bank, last.metrics | metrics, path)

    def _erased(self, last: Checkpoint) -> tuple[Tensors, dict[str, Any]]:
        """The final weights, and what to say of the site erasure; as they are where fewer than two sites tell
        their sums."""
        if not self.model.erased:
            return last.shared, {}
        if self.protected is not None:
            return self.protected.erased(last)
        coded = self.model.with_code(last.shared, last.bank)
        replies, refused = ask_erasure(
            self.grid, self.roster, self.plan, coded, self.model.check_erasure, self.book
        )
        if len(replies) < 2:
            why = f"{len(replies)} of {len(self.roster.sites)} sites told their sums; the site is not erased"
            _log.warning("query.erasure: %s.", why)
            self._note("erasure", skipped=why, refused=refused)
            return last.shared, {"rank": 0, "sites": {}, "skipped": why, "refused": refused}
        shared, summary = self.model.after_erasure(coded, replies)
        return shared, {**summary, "refused": refused}

    def _counted(self, result: RunResult) -> RunResult:
        """With the counts of sites' own audits of the final weights, if the plan asks; what was told before
        is not asked for again."""
        if self.plan.audit_counts is None:
            return result
        path = self.folder / audit_counts.FILE
        if not path.is_file():
            told, sites = audit_counts.ask_audit_counts(
                self.grid, self.roster, self.plan, result.shared, self.book
            )
            text = audit_counts.to_json(told)
            self._note("audit_counts", sites=sites, refused=told.refused, file_sha256=sha256_of(text))
            write_whole(path, text)
        told = audit_counts.read_audit_counts(path.read_text(encoding="utf-8"))
        return dataclasses.replace(
            result, metrics=result.metrics | {"audit_counts": dataclasses.asdict(told)}
        )

    def _generative(self, result: RunResult) -> RunResult:
        """With the diffusion model, if the plan has one."""
        path = self.folder / DIFFUSION_MODEL
        finished = self.diffusion.finish(result.shared, result.bank)
        if finished is None:
            return result
        directions = {n: torch.tensor(one) for n, one in result.metrics.get("directions", {}).items()}
        save_diffusion(path, self.plan, finished, result.shared, result.bank, directions)
        self.diffusion.saved(path)
        self._note("diffusion", policy=finished.policy, steps=finished.steps)
        reports = {"diffusion": finished.reports}
        return dataclasses.replace(result, diffusion=path, metrics=result.metrics | reports)

    def _finished(self, path: Path) -> tuple[Tensors, dict[str, Any]] | None:
        """The final weights and what the metrics say of them, if this run has written them whole."""
        if not path.is_file():
            return None
        try:
            tensors, provenance = load_weights(path)
        except ValueError as error:
            _log.warning("The final weights are damaged and are made again. %s", error)
            return None
        if provenance.get("plan_sha256") != self.plan.sha256:
            return None
        if provenance.get("tensors_sha256") != sha256_of_tensors(tensors):
            _log.warning("The final weights are not as they were written and are made again.")
            return None
        metrics: dict[str, Any] = {
            n: json.loads(provenance[n])
            for n in ("erasure", "federated_probes", "directions", "readers")
            if n in provenance
        }
        return tensors, metrics

    def _save(
        self,
        round_number: int,
        shared: Tensors,
        optimiser: Tensors,
        style_bank: Tensors,
        metrics: dict[str, Any],
        home: Tensors | None = None,
    ) -> Checkpoint:
        checkpoint = Checkpoint(
            plan_sha256=self.plan.sha256,
            round=round_number,
            shared=shared,
            optimiser=optimiser,
            bank=style_bank,
            home=home or {},
            metrics=metrics,
        )
        self.checkpoints.save(checkpoint)
        write_metrics(self.folder, metrics)
        return checkpoint

    def _note(self, kind: str, **what: Any) -> None:
        self.journal.append({"kind": kind, "plan": self.plan.sha256, **what})
