"""Gradients per group are those that each group has alone, and nobody else's; what has none is refused."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from meduet_models.objective.objective import MeduetObjective, StepBatch, StepDraws, draw_step
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from privacy.clipping import joint_norm
from privacy.group_gradients import GroupGradients, clipped_sum, parameters_of_layers
from tests.meduet_models.objective.objective_case import ESTIMATORS, PATHS, PUBLISHED, SITES, TINY, Case
from tests.privacy.mixing_case import TOKENS, VALUES, Mixing, difference, gradients_of, trainable

GROUPS, SIZE = 3, 4


def mixing_scans(seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(GROUPS * SIZE, TOKENS, VALUES, generator=draws, dtype=torch.float64)


def test_gradients_are_those_of_a_loop_over_groups() -> None:
    module, scans = Mixing().double(), mixing_scans()
    ours = gradients_of(module, scans, SIZE, GROUPS)
    assert set(ours) == set(trainable(module))
    for group, part in enumerate(scans.split(SIZE)):
        alone = torch.autograd.grad(module(part, SIZE).sum(), list(module.parameters()))
        assert difference(ours, group, dict(zip(trainable(module), alone, strict=True))) < 1e-13


def test_what_is_not_trained_is_left_alone_and_the_module_is_as_it_was() -> None:
    module, scans = Mixing().double(), mixing_scans()
    every = gradients_of(module, scans, SIZE, GROUPS)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    some = gradients_of(module, scans, SIZE, GROUPS)
    assert list(some) == ["first.bias", "norm.bias", "whole.bias"]
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, every[name], rtol=1e-12, atol=1e-12)
    assert trainable(module) == list(some)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(layer._forward_hooks for layer in module.modules())


# The network and its loss


def grouped(case: Case, restyled: bool, estimator: str, progress: float) -> MeduetObjective:
    """Draw a step in groups, freeze what it does not train; its objective."""
    generator = torch.Generator().manual_seed(5)
    case.draws = draw_step(generator, GROUPS * SIZE, TINY.num_tokens, ObjectiveConfig(), SITES, SIZE)
    reached = parameters_of_layers(case.student)
    if progress < 0.5:
        reached = tuple(name for name in reached if not name.startswith("site_from"))
    for name, parameter in case.student.named_parameters():
        parameter.requires_grad_(name in reached)
    weights = LossWeights() if restyled else PUBLISHED
    return MeduetObjective(ObjectiveConfig(weights=weights, estimator=estimator, masked_share=0.5))


def of_meduet(case: Case, objective: MeduetObjective, progress: float) -> dict[str, Tensor]:
    with GroupGradients(case.student, trainable(case.student), GROUPS, SIZE) as groups:
        objective(case.student, case.teacher, case.batch, case.draws, progress, SIZE).total.backward()
    return groups.gradients()


def largest_difference(case: Case, objective: MeduetObjective, progress: float) -> float:
    """Between gradients per group and those of each group alone."""
    ours, parameters = of_meduet(case, objective, progress), dict(case.student.named_parameters())
    batch, draws, worst = case.batch, case.draws, 0.0
    for group in range(GROUPS):
        rows = slice(group * SIZE, (group + 1) * SIZE)
        alone = objective(
            case.student,
            case.teacher,
            StepBatch(
                batch.latents[rows],
                batch.site[rows],
                None if batch.restyled is None else batch.restyled[rows],
            ),
            StepDraws(
                draws.partner[rows] - group * SIZE, draws.exchanged[rows], draws.show_lent[rows], draws.turn
            ),
            progress,
        )
        theirs = torch.autograd.grad(alone.total, [parameters[name] for name in ours])
        worst = max(worst, difference(ours, group, dict(zip(ours, theirs, strict=True))))
    return worst


@PATHS
@ESTIMATORS
@pytest.mark.parametrize("restyled", [True, False])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_groups_of_the_whole_loss_have_the_gradients_of_a_loop(
    paths: str, estimator: str, restyled: bool, progress: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(paths, batch=GROUPS * SIZE, restyled=restyled)
    objective = grouped(case, restyled, estimator, progress)
    assert largest_difference(case, objective, progress) < 1e-5

    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the loss is computed in float32 otherwise
    batch = case.batch
    answer = None if batch.restyled is None else batch.restyled.double()
    case.batch = StepBatch(batch.latents.double(), batch.site, answer)
    case.student.double()
    case.teacher.double()
    assert largest_difference(case, objective, progress) < 1e-12


@PATHS
@pytest.mark.parametrize("other", [3.0, 1e12, math.nan])
def test_nothing_outside_a_group_changes_its_gradients(paths: str, other: float) -> None:
    case = Case(paths, batch=GROUPS * SIZE)
    objective = grouped(case, True, "full", 1.0)
    before, scans = of_meduet(case, objective, 1.0), case.batch.latents.clone()
    for group in range(GROUPS):
        replaced = torch.full_like(scans, other)
        rows = slice(group * SIZE, (group + 1) * SIZE)
        replaced[rows] = scans[rows]
        case.batch = dataclasses.replace(case.batch, latents=replaced)
        after = of_meduet(case, objective, 1.0)
        assert difference(after, group, {name: tensor[group] for name, tensor in before.items()}) < 1e-6


def test_half_precision_is_as_exact_as_its_forward_pass() -> None:
    case = Case(batch=GROUPS * SIZE)
    objective = grouped(case, True, "full", 1.0)
    exact = of_meduet(case, objective, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = of_meduet(case, objective, 1.0)
    for group in range(GROUPS):
        assert difference(half, group, {name: tensor[group] for name, tensor in exact.items()}) < 0.2
    assert all(tensor.dtype == torch.float32 for tensor in half.values())


def test_all_of_the_network_is_layers_but_the_mask_token() -> None:
    student = Case().student
    assert set(trainable(student)) - set(parameters_of_layers(student)) == {"decoder.mask_token"}


# What is refused


def test_a_trainable_tensor_without_a_gradient_of_its_own_is_named() -> None:
    student = Case().student
    with pytest.raises(ValueError, match=r"decoder\.mask_token is in neither"):
        GroupGradients(student, trainable(student), GROUPS, SIZE)
    with pytest.raises(ValueError, match=r"decoder\.mask_token is not\. Freeze it"):
        GroupGradients(student, parameters_of_layers(student), GROUPS, SIZE)
    with pytest.raises(ValueError, match="the module has no nobody"):
        GroupGradients(student, ["nobody"], GROUPS, SIZE)


def test_a_layer_that_is_only_derived_from_a_linear_one_is_not_taken_for_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = nn.Sequential(nn.Linear(2, 2), Doubled(2, 2))
    assert parameters_of_layers(module) == ("0.weight", "0.bias")
    with pytest.raises(ValueError, match=r"1\.weight is in neither"):
        GroupGradients(module, trainable(module), GROUPS, SIZE)


def test_a_layer_that_the_loss_does_not_reach_is_named() -> None:
    module = Mixing().double()
    module.spare = nn.Linear(2, 2)
    with GroupGradients(module, trainable(module), GROUPS, SIZE) as groups:
        module(mixing_scans(), SIZE).mean().backward()
    with pytest.raises(ValueError, match=r"spare\.weight got no gradient"):
        groups.gradients()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler, of its own
def test_a_compiled_module_and_rows_that_are_no_batches_are_refused() -> None:
    module = Mixing().double()
    module.first.compile()
    with pytest.raises(ValueError, match="not compiled"):
        GroupGradients(module, trainable(module), GROUPS, SIZE)
    module = Mixing().double()
    with (
        pytest.raises(ValueError, match=r"whole batches of 12 at the layer of first\.weight; got 8"),
        GroupGradients(module, trainable(module), GROUPS, SIZE),
    ):
        module(mixing_scans()[:8], SIZE)
    assert trainable(module) and not any(layer._forward_hooks for layer in module.modules())


# The clipped sum


def test_each_group_is_cut_to_the_bound_as_one_vector() -> None:
    gradients = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]]), "b": torch.tensor([4.0, 0.4, 0.0])}
    summed = clipped_sum(gradients, 1.0)
    torch.testing.assert_close(summed.total["a"], torch.tensor([0.9, 0.0]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(summed.total["b"], torch.tensor(1.2).double(), rtol=1e-5, atol=0)
    assert (summed.clipped, summed.not_finite) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_group_that_is_not_finite_counts_as_zero_and_is_counted(value: float) -> None:
    gradients = {"a": torch.ones(3, 2), "b": torch.ones(3, 1)}
    gradients["b"][1] = value
    summed = clipped_sum(gradients, 10.0)
    assert summed.total["a"].tolist() == [2.0, 2.0] and summed.total["b"].tolist() == [2.0]
    assert (summed.clipped, summed.not_finite) == (0, 1)


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1.0, 1e19, 3e38])
def test_no_group_is_longer_than_the_bound_whatever_its_size(size: float) -> None:
    for clip_norm in (1e-30, 1.0, 1e30):
        summed = clipped_sum({"a": torch.full((1, 1000), size)}, clip_norm)
        assert joint_norm(summed.total) <= clip_norm
        assert summed.not_finite == 0


def test_sums_of_some_groups_and_of_the_others_add_to_the_sum_of_all() -> None:
    gradients = {"a": torch.randn(6, 2, 3), "b": torch.randn(6, 4)}
    gradients["a"][4] = math.nan
    whole = clipped_sum(gradients, 1.0)
    parts = [
        clipped_sum({name: t[rows] for name, t in gradients.items()}, 1.0) for rows in (slice(2), slice(2, 6))
    ]
    added = parts[0] + parts[1]
    for name, tensor in whole.total.items():
        torch.testing.assert_close(added.total[name], tensor)
    assert (added.clipped, added.not_finite) == (whole.clipped, whole.not_finite) and whole.not_finite == 1


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="finite clip_norm > 0"):
        clipped_sum({"a": torch.ones(2, 2)}, clip_norm)
