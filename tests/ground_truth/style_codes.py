"""How far style codes with noise tell a patient: `python -m tests.ground_truth.style_codes RUN`.

RUN is a run with `privacy=sums`: its public scans give the axes of the code, its hospitals the patients. Of
all hospitals together so many members are drawn, again and again, their shares added, and noise for each
epsilon; the others are known to the attacker (half of them) or held against the members (the other half). A
line for each number of members and epsilon: the mean area over draws, its deviation, and how many of the
draws a `pool` attacker, who holds everybody's scan, tells better than .60.

Does not do: train, or read what the run's sites told.
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch

from audit.attacks.algebra import leaning
from audit.statistics.intervals import area
from federation.exchanges.style_code import code_promise, privacy_of, style_code
from federation.exchanges.survey import survey_layout
from federation.plan.plan import RunPlan
from meduet_models.style.code import entry_of_scans, vector_of
from meduet_models.threads import fixed_threads
from simulations.audit_run import evidence_of
from simulations.progress import Live

EPSILONS = (1.0, 3.0, 8.0, math.inf)
MEMBERS = (16, 60, 126)
DRAWS = 200


def shares_of(folder: Path) -> tuple[RunPlan, torch.Tensor]:
    """The share of every patient of the run's hospitals, without its part of the count."""
    with Live() as live:
        evidence = evidence_of(folder, live)
    plan, layout = evidence.plan, survey_layout(evidence.plan)
    assert evidence.public is not None, "a run with privacy has public scans"
    code = style_code(plan, evidence.public)
    shares = [
        code.share(vector_of(entry_of_scans(one.latents[one.rows(person)], layout)))[:-1]
        for one in evidence.cohorts.values()
        for person in one.people
    ]
    return plan, torch.stack(shares)


def deviation(plan: RunPlan, epsilon: float) -> float:
    """Of the noise in each number at this epsilon."""
    if math.isinf(epsilon):
        return 0.0
    return code_promise(
        dataclasses.replace(plan, privacy=dataclasses.replace(privacy_of(plan), epsilon=epsilon))
    ).deviation


def traced(
    shares: torch.Tensor, members: int, noise: float, generator: torch.Generator
) -> tuple[float, float]:
    """The area of one draw: of who knows half of the others, and of who holds everybody's scan."""
    order = torch.randperm(len(shares), generator=generator)
    inside, others = shares[order[:members]], shares[order[members:]]
    known, outside = others[: len(others) // 2], others[len(others) // 2 :]
    total = inside.sum(0) + noise * torch.randn(shares.shape[1], generator=generator, dtype=torch.float64)
    mean = total / members
    areas = []
    for usual in (known, shares):
        one, other = (leaning(some, mean, usual).numpy() for some in (inside, outside))
        areas.append(area(one, other))
    return areas[0], areas[1]


def main(folder: Path) -> None:
    """The table."""
    with fixed_threads(1):
        plan, shares = shares_of(folder)
        say = sys.stdout.write
        say(f"{len(shares)} patients, {shares.shape[1]} numbers; {DRAWS} draws\n")
        say("| members | epsilon | tracing | pool | draws with pool above .60 |\n|---|---|---|---|---|\n")
        for members in MEMBERS:
            for epsilon in EPSILONS:
                generator, noise = torch.Generator().manual_seed(0), deviation(plan, epsilon)
                each = np.array([traced(shares, members, noise, generator) for _ in range(DRAWS)])
                tracing, pool = (
                    f"{mean:.2f} ± {spread:.2f}" for mean, spread in zip(*_of(each), strict=True)
                )
                say(f"| {members} | {epsilon:g} | {tracing} | {pool} | {(each[:, 1] > 0.6).mean():.0%} |\n")


def _of(each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over draws."""
    return each.mean(0), each.std(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
