"""Losses of a tiny run, recorded: what changes no mathematics changes none of them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import MeduetObjective, StepBatch, draw_step
from meduet_models.objective.settings import ObjectiveConfig
from meduet_models.objective.teacher import Teacher
from tests.worlds import small_network

ROOT = Path(__file__).parents[3]
TINY = small_network(latent_grid=(4, 4, 6), style_map_grid=(1, 2, 1))
SITES = (0, 1, 2)


def golden_lines() -> list[str]:
    """Ten steps of a tiny run on each path: total and terms, to five digits."""
    lines = []
    for paths in ("split", "joint"):
        torch.set_num_threads(1)
        config = dataclasses.replace(TINY, factor_paths=paths)
        student = MeDUET(config, len(SITES), seed=11)
        teacher = Teacher(student)
        objective = MeduetObjective(ObjectiveConfig())
        optimiser = torch.optim.SGD(student.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(12)
        scans = torch.randn(8, 2, *config.latent_grid, generator=generator)
        scale = torch.tensor([1.0, 1.5, 0.6]).reshape(3, 1, 1, 1, 1)
        for step in range(10):
            draws = draw_step(generator, 8, config.num_tokens, ObjectiveConfig(), SITES)
            site = draws.target_site
            batch = StepBatch(scans * scale[site], site, scans * scale[site[draws.partner]])
            losses = objective(student, teacher, batch, draws, step / 10)
            optimiser.zero_grad()
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            teacher.update(student, 0.9)
            values = {"total": losses.total, **losses.terms}
            lines.append(f"{paths} {step} " + " ".join(f"{k}={v.item():.5g}" for k, v in values.items()))
    return lines


def test_the_losses_of_a_tiny_run_are_the_recorded_ones() -> None:
    """Recorded in tests/golden; a change of the mathematics re-records them:
    `python -m tests.meduet_models.objective.test_golden_losses`."""
    recorded = (ROOT / "tests" / "golden" / "tiny_run.txt").read_text().splitlines()
    for ours, theirs in zip(golden_lines(), recorded, strict=True):
        (*head, values), (*their_head, their_values) = ours.split(" ", 2), theirs.split(" ", 2)
        assert head == their_head
        ours_by_name, theirs_by_name = (
            {k: float(v) for k, v in (pair.split("=") for pair in text.split())}
            for text in (values, their_values)
        )
        assert ours_by_name == pytest.approx(theirs_by_name, rel=1e-3, abs=1e-4), f"{head}"


if __name__ == "__main__":
    (ROOT / "tests" / "golden" / "tiny_run.txt").write_text("\n".join(golden_lines()) + "\n")
