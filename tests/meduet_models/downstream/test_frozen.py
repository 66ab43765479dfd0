"""A frozen model in closed form: what is planted is read, and where it is decides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from meduet_models.content_code import public_code
from meduet_models.downstream.classification import Classification
from meduet_models.downstream.frozen import fit_classes, fit_number, fit_voxels, frozen_features
from meduet_models.downstream.regression import Regression
from meduet_models.downstream.segmentation import Segmentation
from meduet_models.downstream.task import Task
from meduet_models.downstream.tasks import TASKS
from meduet_models.meduet import FactorNetwork, NetworkConfig, layer_normed

CONFIG = NetworkConfig(
    latent_channels=2, latent_grid=(4, 6, 4), patch_size=2, width=12, depth=1, heads=2, decoder_width=12,
    decoder_depth=1, decoder_heads=2, code_size=24,
)  # fmt: skip
SCANS = 60


@pytest.fixture(scope="module")
def network() -> FactorNetwork:
    network = FactorNetwork(CONFIG, seed=1).eval()
    with torch.no_grad():
        seen = layer_normed(network.encode(latents(200, 9)).content)
    network.set_content_code(public_code(seen, CONFIG.code_places, CONFIG.code_channels, CONFIG.code_size))
    return network


def latents(count: int, seed: int) -> Tensor:
    """Smooth scans whose front and back differ by a number that their mean does not show."""
    draws = torch.Generator().manual_seed(seed)
    values = 0.2 * torch.randn(count, 2, *CONFIG.latent_grid, generator=draws)
    tilt = torch.linspace(-1, 1, 6)[None, None, None, :, None]
    return values + tilt * amount(count, seed)[:, None, None, None, None]


def amount(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1000 + seed)) * 2 - 1


def people(count: int) -> tuple[str, ...]:
    return tuple(f"p{n}" for n in range(count))


def read(
    task: Task, network: FactorNetwork, reading: Any, known: Tensor, answers: Tensor, classes: int
) -> Any:
    """From latents to outputs."""
    seen = task.seen(network, reading, known)
    fitted = task.fit(seen, answers, people(len(known)), classes, network.config, 0)
    return lambda unseen: fitted(task.seen(network, reading, unseen))


@pytest.mark.parametrize("reading", ["code", "tokens"])
def test_a_number_and_a_class_are_read_from_where_things_are(network: FactorNetwork, reading: str) -> None:
    known, unseen = latents(SCANS, 1), latents(40, 2)
    number = read(Regression(), network, reading, known, amount(SCANS, 1), 1)
    left = number(unseen)[:, 0] - amount(40, 2)
    assert float(left.square().mean()) < 0.3 * float(amount(40, 2).var())
    label = (amount(SCANS, 1) > 0).long()
    shares = read(Classification(), network, reading, known, label, 2)(unseen)
    torch.testing.assert_close(shares.sum(1), torch.ones(40))
    assert float((shares.argmax(1) == (amount(40, 2) > 0).long()).float().mean()) > 0.85


def test_a_model_without_a_code_is_read_from_its_tokens(network: FactorNetwork) -> None:
    plain = FactorNetwork(CONFIG, seed=1).eval()
    x = latents(5, 3)
    assert frozen_features(network, x, "code").shape == (5, CONFIG.code_size)
    assert torch.equal(frozen_features(plain, x, "code"), frozen_features(plain, x, "tokens"))


def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of voxels of which every second position's follow its own token."""
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, CONFIG.num_tokens, CONFIG.width, generator=draws)
    grid = tokens[:, :, 0].reshape(count, 1, *CONFIG.token_grid) > 0
    voxels = grid.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    return tokens, voxels.long()


def test_voxels_are_read_position_by_position() -> None:
    tokens, labels = planted(80, 1)
    fitted = fit_voxels(tokens, labels, 2, people(80), CONFIG, 0)
    unseen, truth = planted(20, 2)
    scores = fitted(unseen)
    assert scores.shape == (20, 2, 16, 24, 16)
    assert float((scores.argmax(1, keepdim=True) == truth).float().mean()) > 0.7
    shuffled = unseen[:, torch.randperm(CONFIG.num_tokens, generator=torch.Generator().manual_seed(3))]
    assert float((fitted(shuffled).argmax(1, keepdim=True) == truth).float().mean()) < 0.6


def test_what_is_the_same_in_all_labels_is_said_of_every_scan() -> None:
    tokens, labels = planted(10, 4)
    labels[:] = labels[:1]
    scores = fit_voxels(tokens, labels, 2, people(10), CONFIG, 0)(planted(3, 5)[0])
    assert torch.equal(scores.argmax(1, keepdim=True), labels[:3])


@pytest.mark.parametrize("task", TASKS)
def test_one_labelled_scan_is_enough_to_say_something(network: FactorNetwork, task: str) -> None:
    labels = {
        Segmentation.name: torch.ones(1, 1, 16, 24, 16, dtype=torch.long),
        Classification.name: torch.ones(1, dtype=torch.long),
        Regression.name: torch.ones(1),
    }
    fitted = read(TASKS[task], network, "code", latents(1, 1), labels[task], 2)
    assert bool(torch.isfinite(fitted(latents(4, 2))).all())


def test_the_alpha_is_chosen_without_the_patient_who_is_read() -> None:
    features = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(30, generator=torch.Generator().manual_seed(1))
    predicted = fit_number(features, noise, people(30), 0)(features)[:, 0]
    assert float(predicted.var()) < 0.5 * float(noise.var())  # nothing is there: almost nothing is fitted
    shares = fit_classes(features, (noise > 0).long(), 2, people(30), 0)(features)
    assert float((shares[:, 1] - 0.5).abs().max()) < 0.4
