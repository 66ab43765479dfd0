"""Latents that left with noise: are samples nearer to their site's patients, are members traced in moments?

Samples are compared as those of a published model are (`memorisation.py`): nearest training scan against
nearest scan of as many who took no part. Latents of scans that left under the name of samples are their own
nearest scans, and are found so. Moments are a mean like any other: who leans towards it (`algebra.py`)?
Against noise an attack of this kind can only fail to find; what may be found at most says the epsilon.

What this file does not do: reconstruct, or judge the books.

Axes: n = patients, v = numbers of a share.
"""

import time
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audit.attacks.memorisation import copying
from audit.attacks.scores import FEWEST, Scores
from audit.attacks.sums import Sum, attack_tracing
from audit.cohort import Cohort
from audit.evidence import Release
from audit.findings import Finding
from audit.statistics.intervals import ONE_SIDE
from federation.exchanges.latent_moments import MOMENTS, public_moments
from federation.exchanges.latents import BOUNDED
from federation.exchanges.style_code import LATENTS
from federation.plan.plan import RunPlan
from meduet_models.style.bank import StyleBank
from meduet_models.style.common_style import CommonStyle

_SAME = 1e-2
"""Share of the distance between scans below which a sample is the scan, rounding to bfloat16 included."""


def attack_samples(release: Release, cohort: Cohort) -> Finding:
    """Synthetic latents against the patients of their site and those who took no part."""
    assert release.tensors is not None
    began = time.process_time()
    took_part = torch.tensor(cohort.took_part)
    inside, outside = (cohort.latents[rows].flatten(1) for rows in (took_part, ~took_part))
    samples = release.tensors[BOUNDED].float().flatten(1)
    plain = Finding(
        artefact=release.artefact,
        attack="copies",
        measure="excess share nearer to training",
        n_in=min(len(inside), len(outside)),
        n_out=min(len(inside), len(outside)),
        verdict="under-powered",
        sentence=f"Not tried: {len(outside)} scans were held out; at least {FEWEST} are needed.",
        seconds=time.process_time() - began,
    )
    usual = float(torch.cdist(inside, inside).sum() / max(1, len(inside) * (len(inside) - 1)))
    copies = int((torch.cdist(samples, inside).amin(1) < _SAME * usual).sum()) if len(inside) else 0
    if len(outside) < FEWEST and not copies:
        return plain
    near = copying(samples, inside, outside)
    found = copies > 0 or near.chance < ONE_SIDE
    same = f" {copies} of them ARE scans of its patients." if copies else ""
    return Finding(
        artefact=release.artefact,
        attack="copies",
        measure="excess share nearer to training",
        n_in=plain.n_in,
        n_out=plain.n_out,
        value=near.excess,
        baseline=0.0,
        verdict="found" if found else "not found",
        sentence=f"Of {len(samples)} synthetic latents {near.nearer} are nearer to a patient of the site "
        f"than to any of as many who took no part (mean distances {near.ratio:.3f} : 1; as many under "
        f"nobody's membership in {near.chance:.1%} of dealings).{same}",
        seconds=time.process_time() - began,
    )


def attack_moments(
    release: Release,
    cohort: Cohort,
    plan: RunPlan,
    question: Mapping[str, Tensor],
    scored: list[tuple[Finding, Scores]],
) -> Finding:
    """Who leans towards these moments? `question`: the public scans and the bank that came with it."""
    assert release.tensors is not None
    shares = moments_shares(cohort, plan, question)
    total = release.tensors[MOMENTS].double()
    count = max(1.0, float(total[-1] / shares[:, -1].max().clamp(min=1e-12)))
    site, count = np.zeros(len(shares), int), float(round(count))
    one = Sum(release.artefact, shares[:, :-1], cohort.member, site, total[:-1], count)
    return attack_tracing(one, scored)


def moments_shares(cohort: Cohort, plan: RunPlan, question: Mapping[str, Tensor]) -> Float[Tensor, "n v"]:
    """What each candidate adds to the moments, as a site computes it."""
    bank = {name: tensor for name, tensor in question.items() if name != LATENTS}
    common = CommonStyle.of(StyleBank.from_tensors(bank, plan.sites))
    axes = public_moments(plan, common, question[LATENTS])
    own = [common.into(cohort.latents[cohort.rows(p)], cohort.site) for p in cohort.people]
    return torch.stack([axes.share(latents.double().mean(0).flatten()) for latents in own])
