"""Readers of the code from sums: a number in its own unit, of two classes a probability."""

from typing import Any

import torch

from federation.exchanges.probes import ANATOMY, anatomy_bound
from federation.plan.plan import ProbePlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.erasure import ErasureMoments
from meduet_models.published.pretrained import CodeReader
from scans.volume_plan import VolumePlan
from server.exchanges.readers import readers_of_sums
from tests.worlds import small_network, small_plan

FOLDS, WIDTH = 4, 8
RANGES = {"age": (20.0, 90.0), "sex": (0.0, 1.0)}


def a_plan() -> RunPlan:
    return small_plan(
        name="toy",
        seed=0,
        sites=("north", "south"),
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=small_network(width=WIDTH, code_size=WIDTH),
        training=TrainingPlan(rounds=1, steps_per_round=1),
        style=StylePlan(),
        probes=ProbePlan(every_rounds=1, folds=FOLDS, anatomy=RANGES),
    )


def people(site: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, ages and sexes."""
    draws = torch.Generator().manual_seed(site)
    age = 20 + 70 * torch.rand(count, generator=draws)
    sex = (torch.rand(count, generator=draws) < 0.5).float()
    codes = 0.3 * torch.randn(count, WIDTH, generator=draws)
    codes[:, 0] += (age - 55) / 100
    codes[:, 1] += 0.5 * (sex - 0.5)
    return codes, age, sex


def told(plan: RunPlan, codes: torch.Tensor, *targets: torch.Tensor) -> dict[str, Any]:
    style = torch.zeros(len(codes), plan.network.style_width)
    mapped = [
        2 * (own - low) / (high - low) - 1 for own, (low, high) in zip(targets, RANGES.values(), strict=True)
    ]
    joint = torch.cat([codes, style, torch.stack(mapped, 1)], 1)
    folds = [
        ErasureMoments.of(joint[f::FOLDS], [str(i) for i in range(len(joint[f::FOLDS]))], anatomy_bound(plan))
        for f in range(FOLDS)
    ]
    return {ANATOMY: torch.stack([fold.to_vector() for fold in folds])}


def test_a_sex_is_read_as_a_probability_and_an_age_in_years() -> None:
    plan = a_plan()
    readers = readers_of_sums({s: told(plan, *people(i)) for i, s in enumerate(plan.sites)}, plan)
    codes, age, sex = people(7, 1000)
    assert readers["age"].classes is None and readers["sex"].classes == (0.0, 1.0)
    assert float(torch.corrcoef(torch.stack([readers["age"](codes), age]))[0, 1]) > 0.5
    probability = readers["sex"](codes)
    assert float(probability.min()) >= 0.0 and float(probability.max()) <= 1.0
    sure = probability > 0.8
    assert int(sure.sum()) > 100 and 0.75 < float(sex[sure].mean()) < 0.97
    entropy = torch.nn.functional.binary_cross_entropy(probability, sex)
    assert float(entropy) < 0.5 < 0.69  # a coin's


def test_a_sex_that_is_the_same_for_all_is_read_as_the_number_it_is() -> None:
    plan = a_plan()
    codes, age, _ = people(0)
    readers = readers_of_sums({"north": told(plan, codes, age, torch.ones(len(codes)))}, plan)
    assert readers["sex"].classes is None
    torch.testing.assert_close(readers["sex"](codes), torch.ones(len(codes)), atol=1e-4, rtol=0)


def test_a_reader_of_two_classes_lies_between_them() -> None:
    reader = CodeReader((1.0, 0.0), 0.0, (10.0, 20.0))
    told = reader(torch.tensor([[0.0, 5.0], [100.0, 5.0], [-100.0, 5.0]]))
    torch.testing.assert_close(told, torch.tensor([15.0, 20.0, 10.0]))
