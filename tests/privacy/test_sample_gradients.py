"""Gradients per sample of a loss that mixes none are those of a loop; a loss that mixes is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meduet_models.diffusion.path import Path
from meduet_models.diffusion.training import DiffusionTrainee
from meduet_models.diffusion.transformer import DiffusionTransformer
from meduet_models.downstream.classification import Classification
from meduet_models.downstream.segmentation import Segmentation
from meduet_models.meduet import MeDUET
from meduet_models.objective.objective import MeduetObjective
from meduet_models.objective.settings import ObjectiveConfig
from privacy.sample_gradients import per_sample_gradients
from tests.meduet_models.diffusion.small_models import (
    generator,
    small_conditioner,
    small_config,
    small_examples,
    small_latents,
)
from tests.worlds import small_network

SAMPLES = 3


class Apart:
    """An objective that mixes nothing."""

    mixes = False


def check_against_a_loop(objective: object, module: nn.Module, loss: Callable[[slice], Tensor]) -> None:
    module.train()
    ours = per_sample_gradients(objective, module, lambda: loss(slice(None)), SAMPLES)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert set(ours) == set(trained)
    for sample in range(SAMPLES):
        alone = torch.autograd.grad(loss(slice(sample, sample + 1)), list(trained.values()))
        for name, gradient in zip(trained, alone, strict=True):
            torch.testing.assert_close(ours[name][sample], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in module.parameters())


@pytest.mark.parametrize("task", [Classification(), Segmentation()])
def test_fine_tuning_asks_each_scan_alone(task: Classification | Segmentation) -> None:
    network = task.network(MeDUET(small_network(), 2, seed=1), 3, trainable=True, seed=2)
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(SAMPLES, 2, *small_network().latent_grid, generator=draws)
    shape = network(latents).shape[2:]
    answers = torch.randint(3, (SAMPLES, 1, *shape) if shape else (SAMPLES,), generator=draws)
    check_against_a_loop(task, network, lambda rows: task.loss(network(latents[rows]), answers[rows]))


def test_a_diffusion_model_asks_each_sample_alone() -> None:
    transformer = DiffusionTransformer(small_config(("content", "style")), seed=1)
    transformer.null.requires_grad_(False)  # in no layer
    for parameter in transformer.parameters():  # the start is silent
        nn.init.normal_(parameter, std=0.1, generator=generator(2))
    data, noise, time = small_latents(SAMPLES), small_latents(SAMPLES, 1), torch.tensor([0.1, 0.5, 0.8])
    path, conditioner = Path("linear"), small_conditioner()

    def loss(rows: slice) -> Tensor:
        told = conditioner.conditions(small_examples(SAMPLES), ("content", "style")).each(lambda t: t[rows])
        at = data[rows], noise[rows], time[rows]
        return F.mse_loss(transformer(path.noisy(*at), time[rows], told), path.velocity(*at))

    check_against_a_loop(DiffusionTrainee, transformer, loss)


def test_the_loss_that_mixes_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"mixes the scans of a batch.*9\.8 times.*per group"):
        per_sample_gradients(MeduetObjective(ObjectiveConfig()), nn.Linear(2, 2), lambda: torch.zeros(()), 2)


def test_a_layer_that_mixes_and_a_parameter_outside_of_layers_are_refused() -> None:
    x = torch.randn(SAMPLES, 2)
    mixing = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="treat samples alone: BatchNorm"):
        per_sample_gradients(Apart(), mixing, lambda: mixing(x).square().mean(), SAMPLES)
    spare = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"spare\.weight has none"):
        per_sample_gradients(Apart(), spare, lambda: spare["used"](x).square().mean(), SAMPLES)
    resting = nn.Linear(2, 2).eval()
    with pytest.raises(ValueError, match="training mode"):
        per_sample_gradients(Apart(), resting, lambda: resting(x).square().mean(), SAMPLES)
