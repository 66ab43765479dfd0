"""A case for the tests of the objective: a student, a teacher that differs, a batch and its draws."""

import dataclasses

import pytest
import torch

from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import Losses, MeduetObjective, StepBatch, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.objective.teacher import Teacher
from tests.worlds import small_network

TINY = small_network(latent_grid=(4, 4, 6), style_map_grid=(1, 2, 1))
SITES = (0, 1, 2)
PUBLISHED = LossWeights(visible_reconstruction=0.0, invariance=0.0, restyled_reconstruction=0.0)
ESTIMATORS = pytest.mark.parametrize("estimator", ["full", "one_stream", "alternate"])
NOTHING = LossWeights(**{field.name: 0.0 for field in dataclasses.fields(LossWeights)})
PATHS = pytest.mark.parametrize("paths", ["split", "joint"])


class Case:
    """A student, a teacher that differs, a batch and its draws."""

    def __init__(self, paths: str = "split", batch: int = 6, seed: int = 0, restyled: bool = True) -> None:
        config = dataclasses.replace(TINY, factor_paths=paths)
        generator = torch.Generator().manual_seed(seed)
        self.student = MeDUET(config, len(SITES), seed=1)
        self.teacher = Teacher(MeDUET(config, len(SITES), seed=2))
        self.draws = draw_step(generator, batch, config.num_tokens, ObjectiveConfig(), SITES)
        latents = torch.randn(batch, 2, *config.latent_grid, generator=generator)
        assert self.draws.target_site is not None
        self.batch = StepBatch(latents, self.draws.target_site, 1.3 * latents + 0.4 if restyled else None)

    def losses(self, progress: float = 1.0, weights: LossWeights | None = None, **config: object) -> Losses:
        weights = weights or (LossWeights() if self.batch.restyled is not None else PUBLISHED)
        objective = MeduetObjective(ObjectiveConfig(weights=weights, **config))
        return objective(self.student, self.teacher, self.batch, self.draws, progress)


def reconstruction_only(**weights: float) -> LossWeights:
    none = {field.name: 0.0 for field in dataclasses.fields(LossWeights)}
    return LossWeights(**{**none, "reconstruction": 1.0, **weights})
