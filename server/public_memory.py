"""What a run's model keeps of public scans, which needs no patient: a yardstick for attacks by losses.

A plan with privacy trains on phantoms. The centre draws as many fresh ones in the same way, dresses both in
the sites' styles, and asks whether the model's loss tells one from the other, as an attacker of patients
would. What is found concerns nobody, and no policy forbids it: it says how much of a training scan such
weights keep, and what the same attack could have shown of so many patients.

What this file does not do: say that the same holds of patients, of whom noise was told at most.

Axes: m = public scans, c d h w = latents.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from audit.attacks.membership import blind, losses, scores_of
from audit.attacks.scores import Scores, judged
from audit.cohort import Cohort
from audit.findings import OF_NOBODY, Finding
from federation.plan.plan import RunPlan
from meduet_models.published.pretrained import MODEL
from meduet_models.seeds import generator_of
from meduet_models.style.bank import StyleBank
from server.audit import CentresModels
from server.public_latents import phantom_latents, plans_tokenizer, restyled
from server.public_scans import PUBLIC_SCANS, public_scans

NAME = f"{MODEL} on public scans"
_MOST = 128
"""Public scans on either side."""
_DRAWS = 8


def public_memory(folder: Path, plan: RunPlan) -> list[Finding]:
    """The findings of the run in `folder`; none where it trained on no public scan, or is not finished.
    Raises `ValueError` for a damaged file."""
    if plan.privacy is None or not all((folder / name).is_file() for name in (MODEL, PUBLIC_SCANS)):
        return []
    tokenizer = plans_tokenizer(plan, None)
    if tokenizer is None:
        return [_not_tried("The plan's tokenizer is not at hand, which fresh public scans take.")]
    seen = public_scans(plan, folder, None)[:_MOST]
    draws = generator_of("fresh public scans", plan.seed)
    fresh = phantom_latents(plan, tokenizer, len(seen), draws)[: len(seen)]
    models = CentresModels(plan, folder)
    last = models.kept[max(models.kept)] if models.kept else None
    bank = None if last is None or not last.bank else StyleBank.from_tensors(last.bank, plan.sites)
    dressed = torch.cat([restyled(one, plan, bank) for one in (seen, fresh)])
    names = tuple(f"{n}" for n in range(len(dressed)))
    return list(
        _asked(models, Cohort("public", dressed, names, tuple(n < len(seen) for n in range(len(names)))))
    )


def _asked(models: CentresModels, cohort: Cohort) -> Iterator[Finding]:
    """Loss, and loss less that of the common start."""
    assert models.final is not None, "the folder has a model"
    without = blind([cohort])
    began = time.process_time()
    last = losses(models.final, cohort.latents, _DRAWS)
    yield _finding(cohort, -last, "its loss", without, began)
    began = time.process_time()
    start = losses(models.earlier()["the common start"], cohort.latents, _DRAWS)
    yield _finding(cohort, start - last, "its loss less that of the common start", without, began)


def _finding(cohort: Cohort, values: torch.Tensor, by: str, without: Scores, began: float) -> Finding:
    count = int(cohort.member.sum())
    sentence = (
        f"Does {by} tell the public scans that the model was trained on ({count} of them) from as many fresh "
        "ones? No patient is in either: it says how much of a training scan such weights keep."
    )
    found = judged(NAME, "public_loss", scores_of([cohort], {cohort.site: values}), sentence, without, began)
    return replace(found, measure=OF_NOBODY, epsilon_low=None)


def _not_tried(why: str) -> Finding:
    return Finding(
        artefact=NAME,
        attack="public_loss",
        measure=OF_NOBODY,
        n_in=0,
        n_out=0,
        verdict="under-powered",
        sentence=f"Not tried. {why}",
    )
