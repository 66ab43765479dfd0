"""Which attacks an artefact gets: books first, then exact algebra, then statistics; a table by kind.

A kind in a journal that stands in no row is `not audited`, and so is one whose releases are not at hand. What
a release was promised at (from the ledger) stands beside what was reached; a lower bound above the promise is
a contradiction.

What this file does not do: attack by itself, or judge by a policy.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from audit.books import Charged, Read, read_books
from audit.evidence import Evidence, Release
from audit.findings import Finding
from audit.guarantee import largest_rate
from audit.intervals import ONE_SIDE, clopper_pearson
from audit.linkage import attack_latents
from audit.membership import attack_model, attack_round
from audit.memorisation import attack_diffusion
from audit.policy import Behind
from audit.scores import Scores, false_alarms
from audit.sums import (
    Products,
    attack_difference,
    attack_hits,
    attack_products,
    attack_reach,
    attack_sum,
    erasure_sum,
    probe_products,
    survey_sum,
)
from meduet_models.diffusion.artefact import DIFFUSION_MODEL
from meduet_models.published.pretrained import MODEL

Scored = list[tuple[Finding, Scores]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    draws: int = 16
    """Draws of hidden tokens behind a loss."""
    every_round: bool = True
    """Whether each release that is at hand is attacked, or the newest of each kind."""
    null_draws: int = 1000
    """Draws of nobody's membership for each score."""


QUICK = Effort(draws=4, every_round=False, null_draws=100)


@dataclass(frozen=True)
class Artefact:
    """What left, or was published, under one name: a row of the page."""

    name: str
    releases: int
    sha256: tuple[str, ...]
    epsilon: float
    """Charged in the ledger; infinite where there was no noise."""
    delta: float
    findings: tuple[Finding, ...]

    @property
    def epsilon_low(self) -> float | None:
        """The largest lower bound of any attack."""
        bounds = [f.epsilon_low for f in self.findings if f.epsilon_low is not None]
        return max(bounds, default=None)

    @property
    def reached(self) -> float | None:
        """The largest share of members found at one false alarm in a hundred."""
        rates = [f.true_positive_rate for f in self.findings if f.true_positive_rate is not None]
        return max(rates, default=None)

    def largest_rate(self, at: float) -> float:
        """The largest that any attacker could reach."""
        return largest_rate(at, self.epsilon, self.delta)


@dataclass(frozen=True)
class Audited:
    """Everything that was found."""

    artefacts: list[Artefact]
    alarms: int
    """False alarms under nobody's membership."""
    tried: int
    """Of how many tries."""
    behind: list[Behind] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All of them."""
        return [finding for artefact in self.artefacts for finding in artefact.findings]

    @property
    def alarm_interval(self) -> tuple[float, float]:
        """95% interval of the share of false alarms; nominal is .025."""
        return clopper_pearson(self.alarms, self.tried) if self.tried else (0.0, 1.0)

    @property
    def honest(self) -> bool:
        """Whether the share of false alarms is not told from more than the nominal one."""
        return self.alarm_interval[0] <= ONE_SIDE


def audit(evidence: Evidence, effort: Effort, say: Say) -> Audited:
    """Attack everything in order; `say` is told what is under way."""
    scored: Scored = []
    artefacts: list[Artefact] = []
    say("reading the books")
    books = {site: read_books(own) for site, own in evidence.books.items()}
    total = {site: read.total for site, read in books.items()}
    for site, read in books.items():
        artefacts.append(_books_row(site, read))
        for kind, charged in read.charged.items():
            if charged.epsilon == 0:  # random numbers alone: no patient is in it
                continue
            say(f"{site}: {kind}")
            artefacts.append(_released_row(evidence, site, kind, charged, effort, scored))
    pooled = list(_pooled(evidence, scored))
    if pooled:
        artefacts.append(_row("all sites: probe", (), total.values(), pooled))
    if evidence.model is not None:
        say("the published model")
        found = list(attack_model(evidence, effort.draws, scored))
        artefacts.append(_row(MODEL, (evidence.hashes.get(MODEL, ""),), total.values(), found))
    if evidence.diffusion is not None:
        say("the published diffusion model")
        found = list(attack_diffusion(evidence, effort.draws, scored))
        hashes = (evidence.hashes.get(DIFFUSION_MODEL, ""),)
        artefacts.append(_row(DIFFUSION_MODEL, hashes, total.values(), found))
    say("nobody's membership")
    alarms, tried = false_alarms([scores for _, scores in scored], effort.null_draws)
    return Audited([_contradicted(one) for one in artefacts], alarms, tried, list(_behind(evidence, books)))


def _released_row(
    evidence: Evidence, site: str, kind: str, charged: Charged, effort: Effort, scored: Scored
) -> Artefact:
    own = [release for release in evidence.releases if (release.site, release.kind) == (site, kind)]
    at_hand = [release for release in own if release.tensors is not None]
    tried = at_hand if effort.every_round else at_hand[-1:]
    name = f"{site}: {kind}"
    findings = [finding for release in tried for finding in _attacked(evidence, release, effort, scored)]
    findings += _differences(evidence, at_hand)
    if not findings:
        why = _why_not(evidence, kind, own)
        findings = [not_audited(name, why)]
    hashes = tuple(str(release.record["sha256"]) for release in own)
    return Artefact(name, len(own), hashes, charged.epsilon, charged.delta, tuple(findings))


def _why_not(evidence: Evidence, kind: str, own: Sequence[Release]) -> str:
    """Why a kind of release has no finding."""
    if kind not in ATTACKED:
        return "No attack on this kind is known to this version."
    if not own:
        return "Nothing of it is at hand: the site's books do not hold, and it was not opened."
    if own[-1].tensors is None:
        return own[-1].missing
    if "masked" in own[-1].record:
        return "It left under a mask; the sum of all sites, which opens, is not attacked by this version."
    if kind == "survey":
        return "Style sums by body part, or of whole scans, are not attacked by this version."
    return evidence.no_weights or "The weights that came with it are not at hand."


def _attacked(evidence: Evidence, release: Release, effort: Effort, scored: Scored) -> Iterator[Finding]:
    cohort, plan = evidence.cohorts.get(release.site), evidence.plan
    if cohort is None:
        return
    match release.kind:
        case "survey":
            if (one := survey_sum(release, cohort, plan)) is not None:
                yield from attack_sum(one, scored)
        case "erasure":
            if (network := evidence.network_of(release)) is not None:
                yield from attack_sum(erasure_sum(release, cohort, plan, network), scored)
        case "probe":
            if (network := evidence.network_of(release)) is not None:
                for products in probe_products(release, cohort, plan, network):
                    yield from attack_products(products, scored)
        case "probe_hits":
            if (codes := _last_probe(evidence, release.site)) is not None:
                yield attack_hits(release, codes)
        case "round":
            yield from attack_round(evidence, release, effort.draws, scored)
        case "latents":
            yield from attack_latents(evidence, release)


ATTACKED = frozenset({"survey", "erasure", "probe", "probe_hits", "round", "latents"})
"""Kinds of release that `_attacked` knows."""


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
                return probe_products(release, evidence.cohorts[site], evidence.plan, network)[0]
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


def _row(
    name: str, hashes: tuple[str, ...], charged: Iterable[Charged], findings: Sequence[Finding]
) -> Artefact:
    """Of what all sites made together: a patient of one site is charged what that site was."""
    each = list(charged)
    epsilon = max((one.epsilon for one in each), default=math.inf)
    return Artefact(name, 1, hashes, epsilon, max((one.delta for one in each), default=0.0), tuple(findings))


def _contradicted(artefact: Artefact) -> Artefact:
    low = artefact.epsilon_low
    if low is None or low <= artefact.epsilon or artefact.name.endswith(": books"):
        return artefact
    said = Finding(
        artefact=artefact.name,
        attack="books",
        measure="epsilon",
        n_in=0,
        n_out=0,
        value=low,
        ceiling=artefact.epsilon,
        verdict="contradiction",
        sentence=f"An attack shows an epsilon of at least {low:.2f}; the ledger charged "
        f"{artefact.epsilon:.2f}. The promise does not hold.",
    )
    return replace(artefact, findings=(said, *artefact.findings))


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


def not_audited(artefact: str, why: str) -> Finding:
    """The row of what was not attacked."""
    return Finding(
        artefact=artefact,
        attack="none",
        measure="none",
        n_in=0,
        n_out=0,
        verdict="not audited",
        sentence=f"Not audited. {why}",
    )
