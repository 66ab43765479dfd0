"""Attacks on sums that left: style sums of the survey, code sums of the erasure, probe sums and their hits.

The attacker holds candidates' scans and the weights that everybody was sent, and computes each candidate's
vector as a site does. First of all: do the members' vectors add up to what left? If not (other scans, other
weights, noise in between), exact algebra says nothing, and the row says so.

What this file does not do: algebra (`algebra.py`), or statistics of scores (`scores.py`).

Axes: n = candidates, d = numbers in a vector, q = numbers in a content code, t = measured values.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks import algebra
from audit.attacks.scores import FEWEST, Scores, blind_from, judged
from audit.codes import Codes
from audit.cohort import Cohort
from audit.evidence import Release
from audit.findings import Finding, parts
from audit.statistics.intervals import clopper_pearson
from federation.exchanges.erasure import erasure_sums
from federation.exchanges.probes import ANATOMY, FACTORS, fold_moments
from federation.exchanges.style_code import CODE, code_promise, code_shapes, style_code
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.style.code import entry_of_scans, vector_of
from meduet_models.style.moments import StyleMoments

_SAME = 1e-3
"""Relative difference up to which recomputed sums are those that left."""


@dataclass(frozen=True)
class Sum:
    """A sum of one vector per patient, as it left, and the candidates' vectors."""

    artefact: str
    vectors: Float[Tensor, "n d"]
    """Of each candidate, as the attacker computes it."""
    member: np.ndarray
    site: np.ndarray
    """Number of each candidate's site."""
    total: Float[Tensor, " d"]
    count: float
    noise: float = 0.0
    """Deviation of what was added to each number."""

    @property
    def adds_up(self) -> bool:
        """Whether the members' vectors make up what left; of a sum with noise they need not."""
        if self.noise:
            return True
        own = self.vectors[torch.from_numpy(self.member)].double().sum(0)
        return float((own - self.total).norm()) <= _SAME * float(self.total.norm())


@dataclass(frozen=True)
class Products:
    """Sums of products, fold by fold, as they left, and the candidates' vectors."""

    artefact: str
    vectors: Float[Tensor, "n d"]
    member: np.ndarray
    site: np.ndarray
    folds: Sequence[Float[Tensor, "d d"]]
    measured: Sequence[Float[Tensor, "d t"]] = ()
    """Of each fold, sums of the vectors times what was measured; empty where nothing was."""
    truth: Float[Tensor, "n t"] | None = None
    about: str = ""
    """Which of several such sums of one kind these are."""

    @property
    def adds_up(self) -> bool:
        """As `Sum.adds_up`."""
        x = self.vectors[torch.from_numpy(self.member)].double()
        left = torch.stack(list(self.folds)).sum(0)
        return float((x.T @ x - left).norm()) <= _SAME * float(left.norm())


# What left, as sums


def style_vectors(cohort: Cohort, plan: RunPlan) -> Float[Tensor, "n d"] | None:
    """What each candidate adds to the style sums of a site; None where it is not to be had: body parts, whole
    scans."""
    if plan.style.body_parts or plan.volumes.extent != "crop":
        return None
    layout = survey_layout(plan)
    rows = [StyleMoments.of_patient(cohort.latents[cohort.rows(p)], layout) for p in cohort.people]
    names = [name for name in layout.shapes() if name != "count"]
    return torch.stack([torch.cat([row.sums[name].flatten() for name in names]) for row in rows])


def survey_sum(release: Release, cohort: Cohort, plan: RunPlan) -> Sum | None:
    """The style sums of a site; None where candidates' are not to be had."""
    assert release.tensors is not None
    shapes, vectors = survey_layout(plan).shapes(), style_vectors(cohort, plan)
    if vectors is None or set(release.tensors) != set(shapes):
        return None
    total = torch.cat([release.tensors[name].double().flatten() for name in shapes if name != "count"])
    count = float(release.tensors["count"].sum())
    return Sum(release.artefact, vectors, cohort.member, np.zeros(len(vectors), int), total, count)


def code_sum(release: Release, cohort: Cohort, plan: RunPlan, public: Tensor) -> Sum | None:
    """The style code of a site, a sum of shares with noise; None where candidates' shares are not to be
    had. The last number counts patients, noise included: fewer than one are none."""
    assert release.tensors is not None
    if plan.volumes.extent != "crop" or set(release.tensors) != set(code_shapes(plan)):
        return None
    code, layout = style_code(plan, public), survey_layout(plan)
    entries = [entry_of_scans(cohort.latents[cohort.rows(one)], layout) for one in cohort.people]
    vectors = torch.stack([code.share(vector_of(entry))[:-1] for entry in entries])
    total, site = release.tensors[CODE].double(), np.zeros(len(vectors), int)
    count, noise = max(1.0, code.count(total)), code_promise(plan).deviation
    return Sum(release.artefact, vectors, cohort.member, site, total[:-1], count, noise)


def erasure_sum(release: Release, cohort: Cohort, plan: RunPlan, codes: Codes) -> Sum:
    """The sum of a site's content codes, and that of its pooled content where it told it, as one vector."""
    assert release.tensors is not None
    sums = erasure_sums(release.tensors, plan)
    vectors = _scaled(codes.code, sums.codes.bound)
    total = sums.codes.total
    if sums.pooled.count > 0:
        vectors = torch.cat([vectors, _scaled(codes.pooled, sums.pooled.bound)], 1)
        total = torch.cat([total, sums.pooled.total])
    count = float(sums.codes.count)
    return Sum(release.artefact, vectors, cohort.member, _one_site(vectors), total, count)


def probe_products(release: Release, cohort: Cohort, plan: RunPlan, codes: Codes) -> list[Products]:
    """The products of content codes in a site's probe sums: those of all its patients and, where something
    was measured of them, those beside it. Style enters no product here: its branch may stay at the site."""
    assert release.tensors is not None
    size = plan.network.code_size
    code = codes.code
    folds = [fold.outer[:size, :size] for fold in fold_moments(release.tensors, FACTORS, plan)]
    about = f" in round {release.round}"
    made = [Products(release.artefact, code, cohort.member, _one_site(code), folds, about=about)]
    if ANATOMY in release.tensors and cohort.measured is not None:
        beside = fold_moments(release.tensors, ANATOMY, plan)
        if min(float(fold.count) for fold in beside) >= 1:
            targets = len(plan.probes.anatomy)
            truth = cohort.per_person(cohort.measured)
            known = cohort.member & ~torch.isnan(truth).any(1).numpy()
            made.append(
                Products(
                    release.artefact,
                    code,
                    known,
                    _one_site(code),
                    [fold.outer[:size, :size] for fold in beside],
                    [fold.outer[:size, -targets:] for fold in beside],
                    truth,
                    f"{about}, with what was measured,",
                )
            )
    return made


# Attacks


def attack_difference(first: Sum, second: Sum) -> Finding | None:
    """Two releases of one kind of a site, under two plans: is there a patient by whom they differ?

    None unless their counts differ by one. She is told by which candidate's vector the difference is.
    """
    began = time.process_time()
    hers = algebra.difference(first.total, second.total, (first.count, second.count))
    if hers is None:
        return None
    off = (second.vectors.double() - hers).norm(dim=1) / hers.norm().clamp(min=1e-300)
    exact = float(off.min()) < _SAME
    return Finding(
        artefact=second.artefact,
        attack="difference",
        measure="patients read",
        n_in=1,
        n_out=len(off) - 1,
        value=float(exact),
        verdict="found" if exact else "not found",
        sentence=f"Two plans asked for '{parts(second.artefact)[1]}' with one patient between them: "
        "the later sums less the earlier are hers alone."
        if exact
        else "Two plans were answered with one patient more or less, and the difference is no candidate's.",
        seconds=time.process_time() - began,
    )


def attack_sum(one: Sum, scored: list[tuple[Finding, Scores]]) -> Iterator[Finding]:
    """Who is in a sum: by least squares in the pool of candidates, and by leaning towards the mean, which
    needs no exact sum."""
    blind = blind_from(one.vectors.double().numpy(), one.member, one.site)
    d = one.vectors.shape[1]
    began = time.process_time()
    weights, exact = algebra.weights_in(one.vectors, one.total)
    exact &= not one.noise
    if not one.adds_up:
        yield not_recomputed(one.artefact, "pool", one.member)
    elif exact:
        yield _solved_pool(one, weights.numpy() > 0.5, began)
    else:
        values = algebra.leaning(one.vectors, one.total / one.count, one.vectors).numpy()
        own = Scores(values, one.member, one.site)
        sentence = f"Whoever holds the scans of all candidates of this sum of {d} numbers asks who is in it."
        finding = judged(one.artefact, "pool", own, sentence, blind, began)
        scored.append((finding, own))
        yield finding
    yield attack_tracing(one, scored)


def attack_tracing(one: Sum, scored: list[tuple[Finding, Scores]]) -> Finding:
    """Who leans towards the mean of a sum, exact or not."""
    blind = blind_from(one.vectors.double().numpy(), one.member, one.site)
    d, mean, other = one.vectors.shape[1], one.total / one.count, torch.from_numpy(~one.member)
    began = time.process_time()
    values = np.zeros(len(one.member))
    if int(other.sum()) >= FEWEST:
        values = algebra.leaning_of_each(one.vectors, mean, other).numpy()
    own = Scores(values, one.member, one.site)
    sentence = (
        "Whoever holds one candidate's scan, and knows from others what is usual, asks whether she leans "
        f"towards this mean of {d} numbers over {one.count:g} patients (who knew all that is usual could "
        f"reach {algebra.tracing_area(one.count, d):.2f})."
    )
    finding = judged(one.artefact, "tracing", own, sentence, blind, began)
    scored.append((finding, own))
    return finding


def _solved_pool(one: Sum, named: np.ndarray, began: float) -> Finding:
    """The row of a pool in which the sum has one solution."""
    right = int((named == one.member).sum())
    low, high = clopper_pearson(right, len(named))
    site, what = parts(one.artefact)
    return Finding(
        artefact=one.artefact,
        attack="pool",
        measure="share told rightly",
        n_in=int(one.member.sum()),
        n_out=int((~one.member).sum()),
        value=right / len(named),
        low=low,
        high=high,
        verdict="found",
        sentence=f"Whoever holds scans of {len(named)} candidates with all patients of {site} among them "
        f"solves '{what}', one sum of {one.vectors.shape[1]} numbers, for who they are: {right} of "
        f"{len(named)} told rightly.",
        seconds=time.process_time() - began,
    )


def attack_products(one: Products, scored: list[tuple[Finding, Scores]]) -> Iterator[Finding]:
    """Who is in the span of sums of products, who is reached into, and what was measured of whom."""
    if not one.adds_up:
        yield not_recomputed(one.artefact, "span", one.member)
        return
    if one.measured:
        yield _measured(one)
        return
    yield _span(one)
    width, pooled = one.vectors.shape[1], torch.stack(list(one.folds)).sum(0)
    yield from attack_reach(one.artefact, one.vectors, pooled, one.member, one.site, width, scored)


def attack_reach(
    artefact: str,
    vectors: Float[Tensor, "n d"],
    products: Float[Tensor, "d d"],
    member: np.ndarray,
    site: np.ndarray,
    width: int,
    scored: list[tuple[Finding, Scores]],
) -> Iterator[Finding]:
    """Leverage, where at least as many were summed as a vector has numbers: below, it ranks the wrong way."""
    began = time.process_time()
    if int(member.sum()) < width or algebra.rank(products) < width:
        return
    scores = Scores(-algebra.reach(vectors, products).numpy(), member, site)
    finding = judged(
        artefact,
        "leverage",
        scores,
        f"Sums of products of {width} numbers over {int(member.sum())} patients reach further towards their "
        f"own; from about {algebra.smallest_cohort(width)} patients on it would hardly show.",
        blind_from(vectors.double().numpy(), member, site),
        began,
    )
    scored.append((finding, scores))
    yield finding


def attack_hits(release: Release, one: Products) -> Finding:
    """What a question that is crafted for one candidate would have told: is anybody as far along her way?"""
    began = time.process_time()
    x = one.vectors.double()
    usual, member = x.mean(0), torch.from_numpy(one.member)
    metric = torch.cov(x.T) + 1e-3 * x.var(0).mean() * torch.eye(x.shape[1], dtype=torch.float64)
    way = torch.linalg.solve(metric, (x - usual).T)  # d n, one direction for each candidate
    along = (x - usual) @ way  # n n
    hit = (along[member] >= 0.9 * along.diagonal()).sum(0).numpy() > 0
    caught, false = int(hit[one.member].sum()), int(hit[~one.member].sum())
    n_in, n_out = int(one.member.sum()), int((~one.member).sum())
    low, high = clopper_pearson(caught, n_in)
    works = low > (clopper_pearson(false, n_out)[1] if n_out else 1.0)
    few = n_out < FEWEST
    return Finding(
        artefact=release.artefact,
        attack="hits",
        measure="members told by one count",
        n_in=n_in,
        n_out=n_out,
        value=caught / n_in,
        low=low,
        high=high,
        baseline=false / n_out if n_out else None,
        verdict="under-powered" if few else "found" if works else "not found",
        sentence=f"A centre that crafts one question for one candidate reads from the count whether she is a "
        f"patient: {caught} of {n_in} members answered at least one, {false} of {n_out} others. Whether a "
        "question of this run was crafted is not in the books.",
        seconds=time.process_time() - began,
    )


def not_recomputed(artefact: str, attack: str, member: np.ndarray) -> Finding:
    """The row of a sum that the candidates' vectors do not make up."""
    return Finding(
        artefact=artefact,
        attack=attack,
        measure="none",
        n_in=int(member.sum()),
        n_out=int((~member).sum()),
        verdict="under-powered",
        sentence="The members' vectors, computed from the scans at hand, do not make up what left: noise "
        "entered it, scans changed since, or its weights are not at hand. Exact algebra was not possible.",
    )


def _span(one: Products) -> Finding:
    began, inside = time.process_time(), torch.from_numpy(one.member)
    outside = torch.stack([algebra.outside_span(one.vectors, fold) for fold in one.folds]).amin(0)
    ranks = [algebra.rank(fold) for fold in one.folds]
    width = one.vectors.shape[1]
    narrow = max(ranks) < width
    named = (outside < algebra.EXACT).numpy() if narrow else np.zeros(len(outside), bool)
    hits, false = int(named[one.member].sum()), int(named[~one.member].sum())
    n_in, n_out = int(one.member.sum()), int((~one.member).sum())
    low, high = clopper_pearson(hits, n_in)
    site, what = parts(one.artefact)
    if narrow and hits and not false:
        whom = f"each of its {n_in} patients" if hits == n_in else f"{hits} of its {n_in} patients"
        said = (
            f"The sums of '{what}' that {site} released{one.about} identify {whom} to whoever holds her scan."
        )
        if n_out:
            most, least = float(outside[inside].max()), float(outside[~inside].min())
            said += (
                f" Outside of their span lies at most {most:.0e} of a member, at least {least:.0e} of "
                "anybody else."
            )
    else:
        said = (
            f"The sums of '{what}' of {site}{one.about} have {max(ranks)} directions of {width}: "
            f"{'others lie in their span, too' if narrow else 'everybody lies in their span'}."
        )
    return Finding(
        artefact=one.artefact,
        attack="span",
        measure="share of members named",
        n_in=n_in,
        n_out=n_out,
        value=hits / n_in,
        low=low,
        high=high,
        baseline=false / n_out if n_out else None,
        verdict="found" if narrow and hits and not false else "not found",
        sentence=said,
        seconds=time.process_time() - began,
    )


def _measured(one: Products) -> Finding:
    """What was measured of each patient, fold by fold, from whom the span names in it."""
    assert one.truth is not None
    began = time.process_time()
    errors, spread = [], one.truth[torch.from_numpy(one.member)].double()
    for fold, products in zip(one.folds, one.measured, strict=True):
        mine = (algebra.outside_span(one.vectors, fold) < algebra.EXACT) & torch.from_numpy(one.member)
        values = algebra.solved(one.vectors[mine], products) if algebra.rank(fold) < len(fold) else None
        if values is not None:
            errors.append((values - one.truth[mine]).abs().amax(1))
    found = torch.cat(errors) if errors else torch.zeros(0)
    guess = (spread - spread.mean(0)).abs().mean()
    n_in, known = int(one.member.sum()), int((found < 0.01 * guess).sum())
    low, high = clopper_pearson(known, n_in)
    said = "What was measured of a patient does not follow: more patients than numbers in a fold."
    if known:
        said = (
            f"What was measured of {known} of {n_in} patients of {one.artefact.partition(':')[0]} follows by "
            f"least squares: off by at most {float(found.max()):.0e} of half the agreed range, guessing by "
            f"{float(guess):.2f}."
        )
    return Finding(
        artefact=one.artefact,
        attack="measured",
        measure="patients whose value is known",
        n_in=n_in,
        n_out=int((~one.member).sum()),
        value=known / n_in,
        low=low,
        high=high,
        verdict="found" if known else "not found",
        sentence=said,
        seconds=time.process_time() - began,
    )


def _scaled(vectors: Tensor, bound: float) -> Tensor:
    """Each patient's vector, no longer than the bound."""
    scaled: Tensor = vectors * (bound / vectors.norm(dim=1, keepdim=True).clamp(min=bound))
    return scaled


def _one_site(vectors: Tensor) -> np.ndarray:
    return np.zeros(len(vectors), int)
