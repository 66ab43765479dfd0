"""Both paths: from noise to data, with the velocity that says so."""

import pytest
import torch

from meduet_models.diffusion.path import Path, PathName
from tests.meduet_models.diffusion.small_models import generator

PATHS: tuple[PathName, ...] = ("linear", "variance_preserving")
DATA = torch.randn(4, 1, 2, 2, 2, generator=generator(0), dtype=torch.float64)
NOISE = torch.randn(4, 1, 2, 2, 2, generator=generator(1), dtype=torch.float64)
TIME = torch.tensor([0.05, 0.4, 0.8, 0.99], dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_leads_from_noise_to_data(name: PathName) -> None:
    path = Path(name)
    start, end = (
        path.noisy(DATA, NOISE, torch.zeros_like(TIME)),
        path.noisy(DATA, NOISE, torch.ones_like(TIME)),
    )
    torch.testing.assert_close(start, NOISE, atol=0.03, rtol=0.0)
    torch.testing.assert_close(end, DATA, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("name", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(name: PathName) -> None:
    path, h = Path(name), 1e-6
    derivative = (path.noisy(DATA, NOISE, TIME + h) - path.noisy(DATA, NOISE, TIME - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(DATA, NOISE, TIME), derivative, atol=1e-6, rtol=1e-6)


def test_the_variance_is_preserved_and_the_velocity_finite_at_both_ends() -> None:
    path, one, nothing = (
        Path("variance_preserving"),
        torch.ones(101, 1, 1, 1, 1),
        torch.zeros(101, 1, 1, 1, 1),
    )
    time = torch.linspace(0, 1, 101)
    data, noise = path.noisy(one, nothing, time), path.noisy(nothing, one, time)
    torch.testing.assert_close(data.square() + noise.square(), one)
    assert path.velocity(one, one, time).abs().max() < 4
