"""Memorisation of a generative model: scores of candidates, samples near to training, scans returned.

Nearest training scan against nearest held-out scan, out of equal numbers: without memory each is the nearer
one half of the time. Samples are no independent tries, since one typical scan is nearest to many; so chance
is counted by dealing training and held-out anew. A content-conditioned model returns the scan that it is
told, seen or not: only the difference between training and held-out conditions counts (`returned`).

What this file does not do: judge pictures.

Source: copies: Dar et al. 2025 (arXiv:2402.01054); equal numbers: Meehan, Chaudhuri, Dasgupta 2020.

Axes: s = samples, n, m = scans, d = numbers, c d h w = latents.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks.combined import judged_together
from audit.attacks.denoising import SAYS, controlled, denoising, examples_of
from audit.attacks.membership import blind, scores_of
from audit.attacks.scores import FEWEST, Scores, judged
from audit.cohort import Cohort
from audit.evidence import Evidence
from audit.findings import Finding, Picture
from audit.gallery import picture
from audit.statistics.intervals import ONE_SIDE
from meduet_models.diffusion.artefact import DIFFUSION_MODEL, GenerativeModel
from meduet_models.diffusion.conditions import Condition, Conditions, Examples
from meduet_models.diffusion.sampling import SamplingSettings, sample
from meduet_models.tokenizer.tokenizer import Tokenizer

_TOLD: tuple[tuple[Condition, ...], ...] = (("content", "style"), ("style",))
_SAMPLES = 48
_RETURNED = 24
_SHOWN = 5


@dataclass(frozen=True)
class Copying:
    """How much nearer samples are to whom they learned from."""

    nearer: int
    """Samples whose nearest scan is a training scan."""
    ratio: float
    """Mean distance to the nearest training scan over that to the nearest held-out scan."""
    chance: float
    """Share of dealings of nobody's membership with as many or more."""
    excess: float
    """Share of samples over what such dealings give on average."""


def copying(
    samples: Float[Tensor, "s d"],
    training: Float[Tensor, "n d"],
    held_out: Float[Tensor, "m d"],
    dealings: int = 999,
    seed: int = 0,
) -> Copying:
    """Compare with as many of either, drawn at random."""
    count, generator = min(len(training), len(held_out)), torch.Generator().manual_seed(seed)

    def some(scans: Tensor) -> Tensor:
        return scans[torch.randperm(len(scans), generator=generator)[:count]]

    both = torch.cdist(samples.double(), torch.cat([some(training), some(held_out)]).double())

    def nearer(order: Tensor) -> int:
        return int((both[:, order[:count]].amin(1) < both[:, order[count:]].amin(1)).sum())

    straight = torch.arange(2 * count)
    own = nearer(straight)
    dealt = [nearer(torch.randperm(2 * count, generator=generator)) for _ in range(dealings)]
    as_many = sum(other >= own for other in dealt)
    ratio = float(both[:, :count].amin(1).mean() / both[:, count:].amin(1).mean())
    excess = (own - sum(dealt) / len(dealt)) / len(samples)
    return Copying(own, ratio, (1 + as_many) / (1 + dealings), excess)


def attack_diffusion(
    evidence: Evidence, draws: int, scored: list[tuple[Finding, Scores]]
) -> Iterator[Finding]:
    """The published diffusion model: scores told content and style, or style; copies; scans returned."""
    model = evidence.diffusion
    assert model is not None
    cohorts = list(evidence.cohorts.values())
    examples = {c.site: examples_of(c, model.sites.index(c.site)) for c in cohorts if c.site in model.sites}
    cohorts = [c for c in cohorts if c.site in examples]
    if not cohorts:
        return
    without = blind(cohorts)
    each: list[Scores] = []
    for told in _TOLD:
        names = [name for name in told if name in model.transformer.config.sizes.names]
        if names != list(told):
            continue
        began = time.process_time()
        measured = {site: denoising(model, one, names, draws) for site, one in examples.items()}
        for attack in SAYS:
            of = controlled(cohorts, measured, attack, " and ".join(names), without, began)
            scored.append(of)
            each.append(of[1])
            yield of[0]
            began = time.process_time()
    if (together := judged_together(DIFFUSION_MODEL, each, cohorts, without)) is not None:
        scored.append(together)
        yield together[0]
    yield _copies(model, cohorts, examples, evidence.tokenizer)
    if {"content", "style"} <= set(model.transformer.config.sizes.names):
        yield _returned(model, cohorts, examples, scored)


def _sampled(model: GenerativeModel, examples: Examples, names: Sequence[Condition]) -> Tensor:
    conditions: Conditions = model.conditioner.conditions(examples, names)
    return sample(model.transformer, conditions, len(examples), SamplingSettings(), seed=0)


def _copies(
    model: GenerativeModel,
    cohorts: Sequence[Cohort],
    examples: dict[str, Examples],
    tokenizer: Tokenizer | None,
) -> Finding:
    """Samples told the style of held-out and training scans alike, against both."""
    began = time.process_time()
    inside = torch.cat([c.latents[torch.tensor(c.took_part)] for c in cohorts])
    outside = torch.cat([c.latents[~torch.tensor(c.took_part)] for c in cohorts])
    everyone = Examples.join([examples[c.site] for c in cohorts])
    generator = torch.Generator().manual_seed(0)
    asked = everyone.rows(torch.randperm(len(everyone), generator=generator)[:_SAMPLES])
    names = tuple(name for name in _TOLD[1] if name in model.transformer.config.sizes.names)
    plain = Finding(
        artefact=DIFFUSION_MODEL,
        attack="copies",
        measure="excess share nearer to training",
        n_in=min(len(inside), len(outside)),
        n_out=min(len(inside), len(outside)),
        verdict="under-powered",
        sentence=f"Not tried: {len(outside)} scans were held out; at least {FEWEST} are needed.",
    )
    if len(outside) < FEWEST:
        return plain
    samples = _sampled(model, asked, names)
    near = copying(samples.flatten(1), inside.flatten(1), outside.flatten(1))
    found = near.chance < ONE_SIDE
    return replace(
        plain,
        value=near.excess,
        baseline=0.0,
        verdict="found" if found else "not found",
        sentence=f"Of {len(samples)} samples told a style {near.nearer} are nearer to a training scan than "
        f"to any of as many held-out scans (mean distances {near.ratio:.3f} : 1; as many under nobody's "
        f"membership in {near.chance:.1%} of dealings).",
        pictures=() if tokenizer is None else (_nearest(samples, inside, outside, tokenizer),),
        seconds=time.process_time() - began,
    )


def _nearest(samples: Tensor, inside: Tensor, outside: Tensor, tokenizer: Tokenizer) -> Picture:
    """The samples nearest to training scans, for a person to look at."""
    near = torch.cdist(samples.flatten(1), inside.flatten(1))
    first = near.amin(1).argsort()[:_SHOWN]
    held_out = torch.cdist(samples[first].flatten(1), outside.flatten(1)).argmin(1)
    columns = samples[first], inside[near[first].argmin(1)], outside[held_out]
    return picture(
        "Samples; the nearest training scan of each; the nearest held-out scan.",
        [tokenizer.decode(one).clamp(0, 1) for one in columns],
    )


def _returned(
    model: GenerativeModel,
    cohorts: Sequence[Cohort],
    examples: dict[str, Examples],
    scored: list[tuple[Finding, Scores]],
) -> Finding:
    """Told a scan's content and style: does it come back nearer to a scan that was trained on?"""
    began = time.process_time()
    rows = {c.site: _as_many(c) for c in cohorts}
    some = [_part(c, rows[c.site]) for c in cohorts]
    errors = {}
    for c in cohorts:
        asked = examples[c.site].rows(rows[c.site])
        made = _sampled(model, asked, ("content", "style"))
        errors[c.site] = -(made - asked.latents).flatten(1).double().norm(dim=1)
    scores = scores_of(some, errors)
    sentence = (
        "Told a scan's content and style, the model returns it, seen or not; is one that was seen nearer?"
    )
    finding = judged(DIFFUSION_MODEL, "returned", scores, sentence, blind(some), began)
    scored.append((finding, scores))
    return finding


def _as_many(cohort: Cohort) -> Tensor:
    """Rows of as many members as others, few of each."""
    inside, outside = (torch.tensor(cohort.took_part) == side for side in (True, False))
    most = min(_RETURNED, int(inside.sum()), int(outside.sum()))
    return torch.cat([inside.nonzero()[:most, 0], outside.nonzero()[:most, 0]])


def _part(cohort: Cohort, rows: Tensor) -> Cohort:
    chosen = rows.tolist()
    return Cohort(
        cohort.site,
        cohort.latents[rows],
        tuple(cohort.patients[row] for row in chosen),
        tuple(cohort.took_part[row] for row in chosen),
    )
