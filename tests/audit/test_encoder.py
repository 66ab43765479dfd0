"""Scores of an encoder alone: the same draws for all, less where noise weighs less, no false claim."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from audit.attacks.encoder import residuals, responses
from audit.attacks.membership import scores_of
from audit.attacks.scores import judged
from meduet_models.meduet import MeDUET
from tests.audit.released import latents, toy_plan
from tests.audit.trained import cohort_of

IN, ALL = 20, 60
SCANS = latents(ALL, seed=3)
NETWORK = MeDUET(toy_plan().network, 3, seed=1).eval().requires_grad_(False)
Score = Callable[[MeDUET, Tensor, int], Tensor]


@pytest.mark.parametrize("score", [residuals, responses])
def test_every_scan_is_told_the_same_draws(score: Score) -> None:
    together = score(NETWORK, SCANS[:5], 3)
    alone = torch.cat([score(NETWORK, one[None], 3) for one in SCANS[:5]])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, score(NETWORK, SCANS[:5], 4))


def test_content_moves_less_where_noise_weighs_less_and_not_at_all_where_there_is_none() -> None:
    little, much = (residuals(NETWORK, scale * SCANS, 4) for scale in (1e6, 1.0))
    assert float(little.max()) < 1e-6 < float(much.min())


def test_members_whom_noise_moves_less_are_told_and_of_nobody_nothing_is_claimed() -> None:
    def verdict(scans: Tensor, score: Score, sign: float) -> str:
        scores = scores_of([cohort_of(scans, IN)], {"north": sign * score(NETWORK, scans, 8)})
        return judged("model", "invariance", scores, "").verdict

    steadier = SCANS * torch.where(torch.arange(ALL) < IN, 1.5, 1.0)[:, None, None, None, None]
    assert verdict(steadier, residuals, -1.0) == "found"
    assert "found" not in {verdict(SCANS, residuals, -1.0), verdict(SCANS, responses, 1.0)}


def test_a_part_is_like_its_own_place_of_the_whole() -> None:
    told = responses(NETWORK, SCANS, 4)
    assert float(told.mean()) > 0.2  # of a constant code it would be 0
