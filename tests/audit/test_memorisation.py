"""A diffusion model that was trained too long is found out; one that was not trained is not accused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from audit.attacks.denoising import SAYS
from audit.attacks.memorisation import attack_diffusion, copying
from audit.cohort import Cohort
from audit.evidence import Evidence
from audit.findings import Finding
from meduet_models.diffusion.artefact import GenerativeModel
from meduet_models.diffusion.conditions import UNKNOWN, Examples
from meduet_models.diffusion.settings import DiffusionTraining
from meduet_models.diffusion.training import DiffusionTrainee
from tests.audit.released import toy_plan
from tests.generative_models import small_model, small_tokenizer

PATIENTS = 24


def latents(shift: float = 0.0) -> Tensor:
    draws = torch.Generator().manual_seed(5)
    scans = torch.randn(2 * PATIENTS, 2, 4, 6, 4, generator=draws)
    scans[:PATIENTS] += shift
    return scans


class Trained:
    """Some scans as training examples."""

    def __init__(self, scans: Tensor) -> None:
        self.scans = scans

    def __len__(self) -> int:
        return len(self.scans)

    def read(self, rows: Any) -> Examples:
        return examples_of(self.scans[torch.as_tensor(rows)])


def examples_of(scans: Tensor) -> Examples:
    """Scans of the first site of which nothing else is known."""
    unknown = torch.full((len(scans),), UNKNOWN)
    return Examples(
        latents=scans,
        site=torch.zeros(len(scans), dtype=torch.long),
        body_part=unknown,
        spacing=torch.full((len(scans), 3), torch.nan),
        category=unknown,
    )


def overtrained(scans: Tensor, steps: int) -> GenerativeModel:
    model = small_model(small_tokenizer())
    settings = DiffusionTraining(
        batch_size=16, learning_rate=3e-3, restyled_scans=0.0, restyled_content=0.0, site_style=0.0, ema=0.9
    )
    trainee = DiffusionTrainee(
        model.transformer.requires_grad_(True),
        model.conditioner,
        settings,
        total_steps=steps,
        seed=0,
        style_bank=None,
    )
    source = Trained(scans)
    for step in range(steps):
        trainee.step(source, step)
    model.transformer.load_state_dict(trainee.ema.state_dict())
    model.transformer.eval().requires_grad_(False)
    return model


def findings(model: GenerativeModel, scans: Tensor) -> dict[str, list[Finding]]:
    people = tuple(f"p{n}" for n in range(len(scans)))
    took_part = tuple(n < PATIENTS for n in range(len(scans)))
    evidence = Evidence(
        name="toy",
        plan=toy_plan(),
        books={},
        releases=[],
        cohorts={"north": Cohort("north", scans, people, took_part)},
        hashes={},
        diffusion=model,
        tokenizer=small_tokenizer(),
    )
    found: dict[str, list[Finding]] = {}
    shown = 0
    for one in attack_diffusion(evidence, 4, []):
        found.setdefault(one.attack, []).append(one)
        shown += len(one.pictures)
    assert shown == 1  # samples beside their nearest scans
    return found


def test_a_model_that_learned_its_patients_by_heart_is_found_out_by_its_loss() -> None:
    scans = latents()
    found = findings(overtrained(scans[:PATIENTS], 600), scans)
    for attack in SAYS:
        told_both, _ = found[attack]
        assert told_both.verdict == "found" and told_both.low is not None and told_both.low > 0.6


def test_a_model_that_was_not_trained_is_not_accused_and_groups_that_differ_void_the_row() -> None:
    model = small_model(small_tokenizer())
    verdicts = {one.verdict for own in findings(model, latents()).values() for one in own}
    assert "found" not in verdicts
    shifted = findings(model, latents(shift=0.8))["diffusion_loss"]
    assert {one.verdict for one in shifted} == {"void"}


@pytest.mark.parametrize(("copied", "found"), [(0, False), (10, False), (40, True)])
def test_copies_are_told_from_chance_by_dealing_anew(copied: int, found: bool) -> None:
    draws = torch.Generator().manual_seed(1)
    training, held_out, samples = (torch.randn(60, 32, generator=draws) for _ in range(3))
    samples[:copied] = training[:copied] + 0.1 * samples[:copied]
    near = copying(samples, training, held_out)
    assert (near.chance <= 0.001) is found
    assert (near.excess > 0.2) is found


def test_samples_of_nobody_are_accused_as_seldom_as_said() -> None:
    draws = torch.Generator().manual_seed(2)
    chances = []
    for _ in range(100):
        training, held_out, samples = (torch.randn(30, 8, generator=draws) for _ in range(3))
        chances.append(copying(samples, training, held_out, dealings=99).chance)
    assert sum(chance < 0.05 for chance in chances) <= 14  # nominal 5 of 100; false alarm 1 in 4000
