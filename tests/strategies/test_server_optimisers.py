import math

import pytest
import torch

from strategies.server_optimisers import Kind, ServerOptimiser

START, FIRST, SECOND = 1.0, 0.5, -0.25


def two_steps(kind: Kind) -> float:
    optimiser = ServerOptimiser(kind, learning_rate=0.1, momentum=0.9)
    shared = {"w": torch.tensor([START], dtype=torch.float64)}
    for delta in (FIRST, SECOND):
        shared = optimiser.step(shared, {"w": torch.tensor([delta], dtype=torch.float64)})
    return shared["w"].item()


# by hand, from algorithm 2 of arXiv:2003.00295 with β1 = 0.9, β2 = 0.99, τ = 1e-3, v₋₁ = τ²
def test_average_adds_the_updates() -> None:
    assert two_steps("average") == pytest.approx(1.0 + 0.1 * 0.5 + 0.1 * -0.25)


def test_momentum_keeps_nine_tenths_of_the_first_update() -> None:
    assert two_steps("momentum") == pytest.approx(1.0 + 0.1 * 0.5 + 0.1 * (0.9 * 0.5 - 0.25))


def test_adam_is_that_of_the_paper() -> None:
    v1 = 0.99 * 1e-6 + 0.01 * 0.25
    v2 = 0.99 * v1 + 0.01 * 0.0625
    first = 0.1 * 0.05 / (math.sqrt(v1) + 1e-3)
    second = 0.1 * (0.9 * 0.05 + 0.1 * -0.25) / (math.sqrt(v2) + 1e-3)
    assert two_steps("adam") == pytest.approx(1.0 + first + second, rel=1e-12)


def test_yogi_is_that_of_the_paper() -> None:
    v1 = 1e-6 + 0.01 * 0.25  # v < Δ²: grows by (1 - β2) Δ²
    v2 = v1 + 0.01 * 0.0625
    first = 0.1 * 0.05 / (math.sqrt(v1) + 1e-3)
    second = 0.1 * (0.9 * 0.05 + 0.1 * -0.25) / (math.sqrt(v2) + 1e-3)
    assert two_steps("yogi") == pytest.approx(1.0 + first + second, rel=1e-12)


@pytest.mark.parametrize("kind", ["average", "momentum", "adam", "yogi"])
def test_weights_that_nobody_changes_keep_their_bits(kind: Kind) -> None:
    optimiser = ServerOptimiser(kind, learning_rate=0.3, momentum=0.9)
    start = torch.randn(50)
    shared = {"constant": start.clone()}
    for _ in range(3):
        shared = optimiser.step(shared, {"constant": torch.zeros(50)})
    assert torch.equal(shared["constant"], start)


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_an_optimiser_that_takes_up_its_state_goes_on_as_if_never_stopped(kind: Kind) -> None:
    updates = [torch.randn(20, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole = ServerOptimiser(kind, 0.1, 0.9)
    ahead = {"w": torch.zeros(20)}
    for delta in updates:
        ahead = whole.step(ahead, {"w": delta.clone()})
    before, after = ServerOptimiser(kind, 0.1, 0.9), ServerOptimiser(kind, 0.1, 0.9)
    shared = {"w": torch.zeros(20)}
    for delta in updates[:2]:
        shared = before.step(shared, {"w": delta.clone()})
    after.load(before.state())
    before.step(shared, {"w": updates[0].clone()})  # the state that was taken up is a copy
    for delta in updates[2:]:
        shared = after.step(shared, {"w": delta.clone()})
    assert torch.equal(shared["w"], ahead["w"])


def test_an_update_of_other_names_is_an_error() -> None:
    with pytest.raises(ValueError, match="names"):
        ServerOptimiser("average", 1.0, 0.9).step({"w": torch.zeros(1)}, {"v": torch.zeros(1)})
