"""Solvers of the right order, guidance that costs what it must, draws that do not depend on the batch."""

from itertools import pairwise

import pytest
import torch

from meduet_models.diffusion.conditions import CONDITIONS, Condition
from meduet_models.diffusion.path import PathName
from meduet_models.diffusion.sampling import SamplingSettings, Solver, integrate, invert, sample
from tests.meduet_models.diffusion.small_models import (
    awake_transformer,
    generator,
    small_conditioner,
    small_examples,
)

MEAN, DEVIATION = 2.0, 0.5


def velocity_to_a_gaussian(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Exact velocity of the linear path from N(0, 1) to N(MEAN, DEVIATION²)."""
    t = time.double().reshape(-1, 1, 1, 1, 1)
    variance = t**2 * DEVIATION**2 + (1 - t) ** 2
    return MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)


def error(solver: Solver, steps: int, backwards: bool = False) -> float:
    start = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(8, 1, 1, 1, 1)
    exact = MEAN + DEVIATION * start
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if backwards:
        start, exact, times = exact, start, times.flip(0)
    return float((integrate(velocity_to_a_gaussian, start, times, solver) - exact).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0)])
@pytest.mark.parametrize("backwards", [False, True])
def test_solvers_converge_with_their_order(solver: Solver, order: float, backwards: bool) -> None:
    errors = torch.tensor([error(solver, steps, backwards) for steps in (40, 80, 160)])
    rates = torch.log2(errors[:-1] / errors[1:])
    assert rates.tolist() == pytest.approx([order, order], abs=0.15)


def test_25_steps_of_heun_are_exact_to_a_hundredth_of_the_spread() -> None:
    assert error("heun", 25) < 0.01 * DEVIATION < error("euler", 25)


@pytest.mark.parametrize("path", ["linear", "variance_preserving"])
def test_a_scan_taken_to_noise_comes_back(path: PathName) -> None:
    model, examples = awake_transformer(path=path), small_examples(3)
    conditions = small_conditioner().conditions(examples, CONDITIONS)
    settings = SamplingSettings(steps=100)
    noise = invert(model, examples.latents, conditions, settings)
    back = sample(model, conditions, 3, settings, seed=0, noise=noise)
    torch.testing.assert_close(back, examples.latents, atol=2e-3, rtol=0.0)
    other = sample(model, conditions, 3, settings, seed=0)
    assert (other - examples.latents).abs().max() > 0.5


def guided(guidance: dict[Condition, float]) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
    """A sample, and what the transformer was told each time that it was asked."""
    model, asked = awake_transformer(), []
    model.register_forward_pre_hook(
        lambda _, given: asked.append(tuple(n for n in CONDITIONS if getattr(given[2], n) is not None))
    )
    conditions = small_conditioner().conditions(small_examples(2), ("content", "style"))
    settings = SamplingSettings(steps=1, solver="euler", guidance=guidance)
    return sample(model, conditions, 2, settings, seed=0), asked


def test_weights_of_one_are_the_plain_model_at_one_evaluation_a_step() -> None:
    plain, asked = guided({})
    assert asked == [("content", "style")]
    ones, asked = guided({"content": 1.0, "style": 1.0})
    assert asked == [("content", "style")]
    assert torch.equal(plain, ones)


def test_guidance_is_composed_of_the_partly_told_velocities() -> None:
    w_content, w_style = 2.0, 3.5
    both, asked = guided({"content": w_content, "style": w_style})
    assert asked == [(), ("content",), ("content", "style")]
    model, conditions = (
        awake_transformer(),
        small_conditioner().conditions(small_examples(2), ("content", "style")),
    )
    noise = torch.randn(2, 2, 4, 6, 4, generator=generator())
    time = torch.zeros(2)
    v = [model(noise, time, conditions.only(*names)) for names in asked]
    expected = v[0] + w_content * (v[1] - v[0]) + w_style * (v[2] - v[1])
    settings = SamplingSettings(steps=1, solver="euler", guidance={"content": w_content, "style": w_style})
    sampled = sample(model, conditions, 2, settings, seed=0, noise=noise)
    torch.testing.assert_close(sampled, model.to_latents(noise + expected), atol=1e-4, rtol=1e-4)
    assert (both - guided({})[0]).abs().max() > 1e-3


def test_guidance_of_one_condition_costs_one_evaluation_more() -> None:
    assert guided({"style": 2.0})[1] == [("content",), ("content", "style")]
    assert guided({"content": 0.0})[1] == [(), ("content",), ("content", "style")]
    assert guided({"content": 2.0, "style": 2.0})[1] == [(), ("content", "style")]


def test_guidance_by_what_is_not_told_is_refused() -> None:
    with pytest.raises(ValueError, match="Guidance by spacing has no effect"):
        guided({"spacing": 2.0})


def test_a_sample_depends_on_seed_and_place_not_on_the_batch() -> None:
    model, conditions = awake_transformer(), small_conditioner().conditions(small_examples(1), ("content",))
    settings, steps = SamplingSettings(steps=2), []
    one = sample(model, conditions, 5, settings, seed=1, batch_size=2, on_step=lambda *at: steps.append(at))
    assert steps == [(i, 6) for i in range(1, 7)]
    torch.testing.assert_close(one, sample(model, conditions, 5, settings, seed=1))
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(one))
    assert (one - sample(model, conditions, 5, settings, seed=2)).abs().max() > 0.1


def test_rows_that_fit_no_sample_are_refused() -> None:
    model, conditions = awake_transformer(), small_conditioner().conditions(small_examples(3), ("content",))
    with pytest.raises(ValueError, match="each of 4 samples, or one set for all"):
        sample(model, conditions, 4, SamplingSettings(steps=1), seed=0)
    with pytest.raises(ValueError, match="noise for 3 samples; got 2"):
        sample(
            model,
            conditions,
            3,
            SamplingSettings(steps=1),
            seed=0,
            noise=torch.randn(2, 2, 4, 6, 4, generator=generator()),
        )
    with pytest.raises(ValueError, match="at least one sampling step"):
        SamplingSettings(steps=0)
