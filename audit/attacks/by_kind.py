"""Which attacks an artefact gets: books first, then exact algebra, then statistics; a table by kind.

A kind in a journal that stands in no row is `not audited`, and so is one whose releases are not at hand. What
a release was promised at (from the ledger) stands beside what was reached; a lower bound above the promise is
a contradiction.

What this file does not do: attack by itself, or judge by a policy.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from audit.attacks.canaries import attack_canaries
from audit.attacks.claims import attack_claims
from audit.attacks.counts import attack_demographics
from audit.attacks.diffusion_update import attack_diffusion_round
from audit.attacks.inversion import attack_gradient
from audit.attacks.labelled import attack_finetuned, attack_finetuning_round, name_of
from audit.attacks.linkage import attack_latents
from audit.attacks.membership import attack_model
from audit.attacks.memorisation import attack_diffusion
from audit.attacks.noised import attack_moments, attack_samples
from audit.attacks.scores import Scores, false_alarms
from audit.attacks.shadows import attack_by_shadows
from audit.attacks.sums import (
    Products,
    attack_difference,
    attack_hits,
    attack_products,
    attack_reach,
    attack_sum,
    code_sum,
    erasure_sum,
    probe_products,
    survey_sum,
)
from audit.attacks.update import attack_round
from audit.books import Charged, Read, read_books
from audit.effort import Effort
from audit.evidence import Evidence, Release
from audit.findings import Finding
from audit.policy import Behind
from audit.record.artefacts import Artefact, Audited, held_to_promise, not_audited, published
from audit.record.kept import Found, KeptFindings, key_of, options_of
from meduet_models.diffusion.artefact import DIFFUSION_MODEL
from meduet_models.published.pretrained import MODEL

Scored = list[tuple[Finding, Scores]]
Say = Callable[[str], None]
Attacks = Callable[[Scored], Iterable[Finding]]
"""What is tried on an artefact; each score goes to the list, too."""


def audit(evidence: Evidence, effort: Effort, say: Say, kept: KeptFindings | None = None) -> Audited:
    """Attack everything in order; `say` is told what is under way. `kept`: what was found before of the same
    artefacts with the same effort, which is not looked for again."""
    say("reading the books")
    books = {site: read_books(own) for site, own in evidence.books.items()}
    total = [read.total for read in books.values()]
    rows = _Rows(evidence, effort, say, kept or KeptFindings.nowhere())
    for site, read in books.items():
        rows.artefacts.append(_books_row(site, read))
        for kind, charged in read.charged.items():
            if charged.epsilon > 0:  # else random numbers alone: no patient is in it
                rows.released(site, kind, charged)
    rows.together("all sites: probe", (), total, lambda scored: _pooled(evidence, scored))
    if evidence.model is not None:
        hashes = (evidence.hashes.get(MODEL, ""),)
        rows.together(MODEL, hashes, total, lambda scored: _model(evidence, effort.draws, scored))
    if evidence.diffusion is not None:
        hashes = (evidence.hashes.get(DIFFUSION_MODEL, ""),)
        rows.together(
            DIFFUSION_MODEL, hashes, total, lambda scored: attack_diffusion(evidence, effort.draws, scored)
        )
    for one in evidence.finetunings.values():
        rows.together(name_of(one), (one.sha256,), total, partial(attack_finetuned, one))
    say("nobody's membership")
    alarms, tried = false_alarms(rows.scores, effort.null_draws)
    artefacts = [held_to_promise(one) for one in rows.artefacts]
    return Audited(artefacts, alarms, tried, list(_behind(evidence, books)))


def _model(evidence: Evidence, draws: int, scored: Scored) -> Iterator[Finding]:
    yield from attack_model(evidence, draws, scored)
    yield from attack_by_shadows(evidence, draws, scored)


class _Rows:
    """The rows of an audit, one after the other."""

    def __init__(self, evidence: Evidence, effort: Effort, say: Say, kept: KeptFindings) -> None:
        self.artefacts: list[Artefact] = []
        self.scores: list[Scores] = []
        self._evidence, self._effort, self._say, self._kept = evidence, effort, say, kept
        self._options = options_of(evidence, dataclasses.replace(effort, null_draws=0))

    def released(self, site: str, kind: str, charged: Charged) -> None:
        """Everything of a kind that a site released."""
        evidence, effort = self._evidence, self._effort
        own = [release for release in evidence.releases if (release.site, release.kind) == (site, kind)]
        at_hand = [release for release in own if release.tensors is not None]
        tried = at_hand if effort.every_round else at_hand[-1:]
        name = f"{site}: {kind}"
        hashes = tuple(str(release.record["sha256"]) for release in own)

        def attacks(scored: Scored) -> Iterator[Finding]:
            for release in tried:
                yield from _attacked(evidence, release, effort, scored)
            yield from _differences(evidence, at_hand)
            yield from attack_canaries(evidence, at_hand, charged)

        findings = self._found(name, hashes, attacks) or (not_audited(name, _why_not(evidence, kind, own)),)
        self.artefacts.append(Artefact(name, len(own), hashes, charged.epsilon, charged.delta, findings))

    def together(
        self, name: str, hashes: tuple[str, ...], total: Sequence[Charged], attacks: Attacks
    ) -> None:
        """What all sites made together; no row where nothing could be tried."""
        if findings := self._found(name, hashes, attacks):
            self.artefacts.append(published(name, hashes, total, findings))

    def _found(self, name: str, hashes: tuple[str, ...], attacks: Attacks) -> tuple[Finding, ...]:
        key = key_of(name, hashes, self._options)
        known = self._kept.read(name, key)
        if known is None:
            self._say(name)
            scored: Scored = []
            known = Found(tuple(attacks(scored)), tuple(scores for _, scores in scored))
            self._kept.write(name, key, known)
        else:
            self._say(f"{name}: as found before")
        self.scores += known.scores
        return known.findings


def _why_not(evidence: Evidence, kind: str, own: Sequence[Release]) -> str:
    """Why a kind of release has no finding."""
    if kind not in ATTACKED:
        return "No attack on this kind is known to this version."
    if not own:
        return "Nothing of it is at hand: the site's books do not hold, and it was not opened."
    if own[-1].tensors is None:
        return own[-1].missing
    if "masked" in own[-1].record and kind not in ("round", "private_round"):
        return "It left under a mask."
    if kind == "style_code" and evidence.public is None:
        return "The plan's public scans, which give the axes of the code, are not at hand."
    if kind in ("survey", "style_code"):
        return "Style sums by body part, or of whole scans, are not attacked by this version."
    if kind == "latent_moments":
        return "The public scans that came with the question are not kept any more."
    if kind == "demographics":
        return "Ages and sexes of its patients are not at hand."
    return evidence.no_weights or "The weights that came with it are not at hand."


def _attacked(evidence: Evidence, release: Release, effort: Effort, scored: Scored) -> Iterator[Finding]:
    cohort, plan = evidence.cohorts.get(release.site), evidence.plan
    if cohort is None:
        return
    match release.kind:
        case "survey":
            if (one := survey_sum(release, cohort, plan)) is not None:
                yield from attack_sum(one, scored)
        case "style_code":
            if evidence.public is not None:
                if (one := code_sum(release, cohort, plan, evidence.public)) is not None:
                    yield from attack_sum(one, scored)
        case "erasure":
            if (network := evidence.network_of(release)) is not None:
                codes = evidence.codes.of(network, cohort)
                yield from attack_sum(erasure_sum(release, cohort, plan, codes), scored)
        case "probe":
            if (network := evidence.network_of(release)) is not None:
                codes = evidence.codes.of(network, cohort)
                for products in probe_products(release, cohort, plan, codes):
                    yield from attack_products(products, scored)
        case "probe_hits":
            if (last := _last_probe(evidence, release.site)) is not None:
                yield attack_hits(release, last)
        case "round":
            yield from attack_round(evidence, release, effort.draws, scored)
            if effort.iterations and release is _inverted(evidence):
                yield from attack_gradient(evidence, release, effort.iterations, effort.restarts)
        case "private_round":
            yield from attack_round(evidence, release, effort.draws, scored)
        case "diffusion":
            yield from attack_diffusion_round(evidence, release, effort.draws, scored)
        case "finetuning":
            yield from attack_finetuning_round(evidence, release, scored)
        case "latents":
            yield from attack_latents(evidence, release)
        case "synthetic_latents":
            yield attack_samples(release, cohort)
        case "latent_moments":
            if (question := evidence.question_of(release)) is not None:
                yield attack_moments(release, cohort, plan, question, scored)
        case "demographics":
            if (told := attack_demographics(release, cohort, plan)) is not None:
                yield told
        case "audit_counts":
            network = evidence.network_of(release)
            if network is not None and (told := attack_claims(release, cohort, plan, network)) is not None:
                yield told


ATTACKED = frozenset(
    {
        "audit_counts",
        "demographics",
        "diffusion",
        "erasure",
        "finetuning",
        "latents",
        "private_round",
        "probe",
        "probe_hits",
        "round",
        "style_code",
        "survey",
        "synthetic_latents",
        "latent_moments",
    }
)
"""Kinds of release that `_attacked` knows."""


def _inverted(evidence: Evidence) -> Release | None:
    """The one round at whose weights a gradient is turned back: the newest, where it names among most."""
    rounds = [one for one in evidence.releases if one.kind == "round" and "masked" not in one.record]
    able = [one for one in rounds if one.site in evidence.cohorts and evidence.before_after(one) is not None]
    return max(able, key=lambda one: (len(evidence.cohorts[one.site].people), one.round), default=None)


def _differences(evidence: Evidence, releases: Sequence[Release]) -> list[Finding]:
    """Sums of one site that were asked for again under another plan: the survey, whose vectors no weights
    change."""
    surveys = [release for release in releases if release.kind == "survey"]
    if len(surveys) < 2:
        return []
    sums = [survey_sum(one, evidence.cohorts[one.site], evidence.plan) for one in surveys]
    pairs = [(a, b) for a, b in pairwise(sums) if a is not None and b is not None]
    return [one for a, b in pairs if (one := attack_difference(a, b)) is not None]


def _last_probe(evidence: Evidence, site: str) -> Products | None:
    for release in reversed(evidence.releases):
        if (release.site, release.kind) == (site, "probe") and release.tensors is not None:
            network = evidence.network_of(release)
            if network is not None:
                cohort = evidence.cohorts[site]
                codes = evidence.codes.of(network, cohort)
                return probe_products(release, cohort, evidence.plan, codes)[0]
    return None


def _pooled(evidence: Evidence, scored: Scored) -> Iterator[Finding]:
    """What a secure sum of the sites' probe sums would still have shown: the pooled products."""
    each = [one for site in evidence.cohorts if (one := _last_probe(evidence, site)) is not None]
    if len(each) < 2 or not all(one.adds_up for one in each):
        return
    yield from attack_reach(
        "all sites: probe",
        torch.cat([one.vectors for one in each]),
        torch.stack([torch.stack(list(one.folds)).sum(0) for one in each]).sum(0),
        np.concatenate([one.member for one in each]),
        np.repeat(np.arange(len(each)), [len(one.member) for one in each]),
        each[0].vectors.shape[1],
        scored,
    )


def _books_row(site: str, read: Read) -> Artefact:
    findings = [
        Finding(
            artefact=f"{site}: books",
            attack="books",
            measure="problems",
            n_in=len(read.released),
            n_out=0,
            verdict="contradiction",
            sentence=problem,
        )
        for problem in read.problems
    ] or [
        Finding(
            artefact=f"{site}: books",
            attack="books",
            measure="problems",
            n_in=len(read.released),
            n_out=0,
            value=0.0,
            verdict="not found",
            sentence=f"Each of {len(read.released)} releases of {site} was reserved first, charged once and "
            "left under one question; both chains are whole.",
        )
    ]
    return Artefact(f"{site}: books", len(read.released), (), 0.0, 0.0, tuple(findings))


def _behind(evidence: Evidence, books: dict[str, Read]) -> Iterator[Behind]:
    numbers = {"erasure": evidence.plan.network.code_size}
    for site, read in books.items():
        for line in read.released:
            if line["kind"] in ("survey", "erasure", "probe", "probe_hits"):
                kind = str(line["kind"])
                patients = line["weight"]
                if kind == "probe":
                    patients = patients // evidence.plan.probes.folds
                yield Behind(f"{site}: {kind}", int(patients), numbers.get(kind, 0))
