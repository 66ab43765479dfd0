"""Scores of a diffusion model are held against the scan's own variance (rows 12, 13 and 16 of the issue)."""

import numpy as np
import pytest
import torch

from audit.attacks.denoising import FEWEST_DRAWS, SAYS, controlled, denoising
from audit.attacks.scores import Scores
from audit.cohort import Cohort
from audit.findings import Finding
from meduet_models.diffusion.path import Path, PathName
from tests.audit.released import latents
from tests.audit.test_memorisation import examples_of
from tests.generative_models import small_model, small_tokenizer

ALL, IN = 120, 60


def judged_with(loss_over_variance: np.ndarray, variance: np.ndarray) -> Finding:
    """The finding of a loss of so much for each unit of a scan's variance."""
    cohort = Cohort("north", latents(ALL, 0), tuple(map(str, range(ALL))), tuple(n < IN for n in range(ALL)))
    measured = {"diffusion_loss": torch.from_numpy(loss_over_variance * variance)}
    measured |= {"variance": torch.from_numpy(variance)}
    nothing = Scores(np.random.default_rng(3).normal(size=ALL), cohort.member, np.zeros(ALL, int))
    return controlled([cohort], {"north": measured}, "diffusion_loss", "style", nothing, 0.0)[0]


def test_a_loss_that_only_says_how_much_a_scan_varies_is_void() -> None:
    draws = np.random.default_rng(0)
    variance = draws.uniform(0.5, 1.5, ALL)
    variance[:IN] -= 0.4
    finding = judged_with(draws.normal(1, 0.05, ALL), variance)
    assert finding.verdict == "void" and finding.epsilon_low is None
    assert finding.sentence.endswith("Void: the scan's variance alone tells as much.")


def test_a_loss_that_tells_beyond_the_variance_is_found_whether_or_not_the_variance_tells() -> None:
    draws = np.random.default_rng(1)
    for less in (0.0, 0.4):
        variance = draws.uniform(0.5, 1.5, ALL)
        variance[:IN] -= less
        loss = draws.normal(1, 0.1, ALL)
        loss[:IN] -= 0.6
        assert judged_with(loss, variance).verdict == "found"


def test_every_scan_is_told_the_same_draws_and_at_least_eight_of_them() -> None:
    model = small_model(small_tokenizer())
    scans = latents(3, seed=0)
    twice = examples_of(torch.cat([scans, scans]))
    told = denoising(model, twice, ("content", "style"), draws=1)
    assert set(told) == {*SAYS, "variance"}
    for values in told.values():
        assert torch.allclose(values[:3], values[3:], rtol=1e-5)
    more = denoising(model, twice, ("content", "style"), draws=FEWEST_DRAWS)
    assert all(torch.equal(told[name], more[name]) for name in told)


@pytest.mark.parametrize("name", ["linear", "variance_preserving"])
def test_the_noise_of_a_sample_comes_back_from_its_velocity(name: PathName) -> None:
    path, data, noise = Path(name), latents(4, 0), latents(4, 1)
    time = torch.tensor([0.1, 0.5, 0.9, 1.0])
    back = path.noise_in(path.noisy(data, noise, time), path.velocity(data, noise, time), time)
    assert torch.allclose(back[:3], noise[:3], atol=1e-4)
