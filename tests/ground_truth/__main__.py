"""What the audit must find on real scans: `python -m tests.ground_truth SCANS FOLDER ROW...`.

Rows 9 to 17 of the ground truth, on hippocampus crops that a run without protection trained on, each beside
the value that was measured before this audit was written. `make audit-ground-truth` runs all rows. A run that
is in FOLDER already is gone on with. The status is 1 where a row claims what must not be claimed, or misses
what must be found: it is found where the attack works and its interval meets the one from before, or lies
above it.

Does not do: the rows of exact algebra, which need seconds and no scans (`tests/audit/test_ground_truth.py`).
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audit.attacks.inversion import attack_gradient
from audit.attacks.membership import attack_model
from audit.attacks.memorisation import attack_diffusion
from audit.attacks.update import attack_round
from audit.cohort import Cohort
from audit.evidence import Evidence, Release
from audit.findings import Finding
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditioner import Conditioner, condition_sizes
from meduet_models.diffusion.conditions import Condition
from meduet_models.diffusion.initialisation import first_transformer
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.diffusion.training import DiffusionTrainee
from meduet_models.diffusion.transformer import DiffusionConfig
from meduet_models.threads import fixed_threads
from simulations.audit_run import evidence_of
from simulations.progress import Live
from tests.audit.test_memorisation import Trained
from tests.audit.trained import WEIGHTS, after_round, start

RUN = (
    "experiment=hippocampus",
    "site.split_fractions=[0.5,0.05,0.45]",
    "style.minimum_cohort=4",
    "probes.every_rounds=0",
    "evaluation.every_rounds=20",
    "checkpoints.keep_early=true",
    "engine.workers=1",
)
TOLD: tuple[Condition, ...] = ("content", "style")
DRAWS = 16
HEAD = ("row", "what", "before", "now", "blind", "verdict", "s of CPU", "as it must be")
MOST = 0.62  # area that no single score of the weights of an ordinary run may be told to exceed
FEW, STEPS = 6, 200  # patients of each site, and steps, of an over-trained network


@dataclass(frozen=True)
class Row:
    """A finding beside what was measured before."""

    number: int
    what: str
    finding: Finding
    before: str
    holds: bool
    """Whether what must be found was, or what must not be claimed was not."""


def published(evidence: Evidence) -> Iterator[Row]:
    """Row 9: the final weights of an ordinary run. No single score is above `MOST`; together, weighed on half
    of the candidates, they tell more since most steps train the very error that the loss reads."""
    before = {
        "loss": ".58 [.51, .65]",
        "the common start": ".59 [.52, .66]",
        "round 19": ".55 [.48, .62]",
        "invariance": ".52 [.45, .59]",
        "combined": "later: .75 [.65, .83]",
    }
    for finding in attack_model(evidence, DRAWS, []):
        name = next((name for name in before if f"of {name}," in finding.sentence), finding.attack)
        holds = (finding.low or 0) <= MOST
        if finding.attack == "combined":
            holds = _meets(finding, (0.65, 0.83))
        yield Row(9, f"final weights: {name}", finding, before.get(name, ""), holds)


def overtrained(evidence: Evidence) -> Iterator[Row]:
    """Row 10: weights that saw 18 patients 89 times."""
    plan, few = evidence.plan, _few(evidence, FEW)
    training = replace(plan.training, rounds=1, steps_per_round=STEPS, batch_size=8)
    objective = replace(plan.objective, weights=WEIGHTS, masked_share=0.0)
    plan = replace(
        plan, training=training, objective=objective, style=replace(plan.style, exchange="none", anchor=0.0)
    )
    before = start(plan, torch.cat([one.latents for one in few.values()]))
    after = after_round(plan, before, _trained_on(few))
    told = replace(evidence, cohorts=few, model=after, earlier={"the common start": before})
    expected = {
        "loss": ".75 [.63, .87]",
        "calibrated_loss": ".85 [.74, .93]",
        "invariance": ".60 [.46, .74], no finding",
    }
    within = {"loss": (0.63, 0.87), "calibrated_loss": (0.74, 0.93)}
    for finding in attack_model(told, DRAWS, []):
        interval = within.get(finding.attack)
        holds = (
            _meets(finding, interval) if interval else finding.attack != "invariance" or not _found(finding)
        )
        yield Row(10, f"over-trained: {finding.attack}", finding, expected.get(finding.attack, ""), holds)


def round_of_one_site(evidence: Evidence) -> Iterator[Row]:
    """Row 11: harbour's last update but one; members are those whom its steps drew."""
    expected = {"update": ".63 [.54, .72]", "alignment": ".56 [.47, .64]"}
    for finding in attack_round(evidence, _release(evidence, "harbour", 19), DRAWS, []):
        yield Row(11, f"round 19: {finding.attack}", finding, expected[finding.attack], True)


def memorised(evidence: Evidence) -> Iterator[Row]:
    """Rows 12, 14 and 15: a diffusion model that saw 18 patients 355 times."""
    expected = {
        "diffusion_loss": "1.00 [.998, 1.00]; told style alone .70, no finding",
        "copies": "15 of 18 nearer, ratio .981",
        "returned": "all of either side; errors .035 against .195",
    }
    numbers = {"copies": 14, "returned": 15}
    for finding in _diffusion(evidence, _few(evidence, FEW), steps=400):
        if "told content and style" in finding.sentence and finding.attack.startswith("diffusion"):
            holds = _meets(finding, (0.94, 1.0))
        elif finding.attack == "diffusion_loss":
            holds = not _found(finding)
        else:
            holds = True
        number = numbers.get(finding.attack, 12)
        yield Row(number, f"over-trained: {_what(finding)}", finding, expected.get(finding.attack, ""), holds)


def ordinary(evidence: Evidence) -> Iterator[Row]:
    """Rows 13 and 15: a diffusion model that saw 126 patients 38 times."""
    expected = {
        "diffusion_loss": ".63 [.57, .70]; over variance .57",
        "copies": "13 of 24 nearer",
        "returned": "all of either side; errors .179 against .210",
    }
    for finding in _diffusion(evidence, evidence.cohorts, steps=300):
        number = 15 if finding.attack == "returned" else 13
        holds = finding.attack != "copies" or not _found(finding)
        yield Row(number, f"ordinary: {_what(finding)}", finding, expected.get(finding.attack, ""), holds)


def untrained(evidence: Evidence) -> Iterator[Row]:
    """Row 16: a diffusion model that learned from nobody, and six who are called members."""
    for finding in _diffusion(evidence, _few(evidence, 2), steps=0):
        if finding.attack.startswith("diffusion"):
            said = "void: blind .69, its loss .74" if finding.attack == "diffusion_loss" else ""
            yield Row(16, f"untrained: {_what(finding)}", finding, said, not _found(finding))


def gradient(evidence: Evidence) -> Iterator[Row]:
    """Row 17: one gradient of two scans, at the weights of round 19."""
    release = _release(evidence, "harbour", 19)
    expected = {120: "distance .33, 0 of 2: inconclusive", 350: "distance .1, 1 of 2, ranks 1 and 10"}
    for iterations, before in expected.items():
        for finding in attack_gradient(evidence, release, iterations, restarts=1):
            holds = _found(finding) or "no evidence of safety" in finding.sentence
            if iterations == 350 and finding.attack == "inversion":
                holds = _found(finding)
            yield Row(17, f"{finding.attack}, {iterations} iterations", finding, before, holds)


ROWS: dict[int, Callable[[Evidence], Iterator[Row]]] = {
    9: published,
    10: overtrained,
    11: round_of_one_site,
    12: memorised,
    13: ordinary,
    16: untrained,
    17: gradient,
}


def _found(finding: Finding) -> bool:
    return finding.verdict == "found"


def _meets(finding: Finding, before: tuple[float, float]) -> bool:
    """Whether it is found, and its interval meets the one from before or lies above it."""
    return _found(finding) and before[0] <= (finding.high or 0.0)


def _what(finding: Finding) -> str:
    """The attack, and what the diffusion model was told."""
    if not finding.attack.startswith("diffusion"):
        return finding.attack
    return f"{finding.attack}, told {'content and style' if 'content' in finding.sentence else 'style'}"


def _release(evidence: Evidence, site: str, round_number: int) -> Release:
    wanted = (site, "round", round_number)
    return next(one for one in evidence.releases if (one.site, one.kind, one.round) == wanted)


def _few(evidence: Evidence, count: int) -> dict[str, Cohort]:
    """Of each site so many patients of training, the first, and everybody who was held out."""
    chosen = {}
    for site, one in evidence.cohorts.items():
        inside, outside = (np.flatnonzero(np.array(one.took_part) == side) for side in (True, False))
        rows = [*inside[:count], *outside]
        people, took_part = ([values[row] for row in rows] for values in (one.patients, one.took_part))
        chosen[site] = Cohort(site, one.latents[rows], tuple(people), tuple(took_part))
    return chosen


def _trained_on(cohorts: Mapping[str, Cohort]) -> Tensor:
    """The scans of everybody who took part."""
    return torch.cat([one.latents[torch.tensor(one.took_part)] for one in cohorts.values()])


def _diffusion(evidence: Evidence, cohorts: Mapping[str, Cohort], steps: int) -> Iterator[Finding]:
    """Train a diffusion model on those who took part, and attack it."""
    assert evidence.model is not None
    conditioner = Conditioner(evidence.model, maps=True)
    network = evidence.model.config
    sizes = condition_sizes(network, TOLD, maps=True, body_parts=0, categories=0, labels=0)
    shape = TransformerShape(patch_size=2, width=96, depth=3, heads=6)
    config = DiffusionConfig(
        latent_channels=network.latent_channels,
        latent_grid=network.latent_grid,
        shape=shape,
        sizes=sizes,
        path="linear",
    )
    settings = DiffusionTraining(
        batch_size=16, learning_rate=3e-3, ema=0.99, site_style=0.0, restyled_content=0.0, restyled_scans=0.0
    )
    transformer = first_transformer(config, evidence.model, settings, seed=0)
    trainee = DiffusionTrainee(
        transformer, conditioner, settings, total_steps=max(steps, 1), seed=0, style_bank=None
    )
    source = Trained(_trained_on(cohorts))
    for step in range(steps):
        trainee.step(source, step)
    model = GenerativeModel(
        transformer=trainee.ema,
        encoder=evidence.model,
        bank=None,
        sites=tuple(cohorts),
        directions=dict[str, Tensor](),
        tokenizer_sha256=evidence.plan.tokenizer_sha256,
        volumes={"registered": True},
        body_parts=(),
        categories=(),
        policy="raw",
        patient_data=True,
        provenance={},
    )
    yield from attack_diffusion(replace(evidence, cohorts=cohorts, diffusion=model), DRAWS, [])


def said(row: Row) -> str:
    """A line of the table."""
    one = row.finding
    between = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    value = "none" if one.value is None else f"{one.value:.2f}{between}"
    blind = "" if one.baseline is None else f"{one.baseline:.2f}"
    cells = [str(row.number), row.what, row.before, value, blind, one.verdict, f"{one.seconds:.0f}"]
    return f"| {' | '.join([*cells, 'yes' if row.holds else 'NO'])} |"


def main(scans: Path, folder: Path, numbers: list[int]) -> int:
    """Run, attack, print; the exit status."""
    if not (folder / "model.safetensors").is_file():
        command = ["meduet-simulate", *RUN, f"root={scans}", f"folder={folder}"]
        subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)
    say = sys.stdout.write
    holds = True
    with fixed_threads(1):
        with Live() as live:
            evidence = evidence_of(folder, live)
        say(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|\n")
        for number in numbers:
            began = time.process_time()
            for row in ROWS[number](evidence):
                holds &= row.holds
                say(f"{said(row)}\n    {row.finding.sentence}\n")
                sys.stdout.flush()
            say(f"row {number}: {time.process_time() - began:.0f} s of CPU, training included\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]] or list(ROWS)))
