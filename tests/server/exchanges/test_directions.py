"""Directions of anatomy in content: on sums of a population whose truth is known."""

import dataclasses
from typing import Any

import pytest
import torch

from federation.exchanges.probes import ANATOMY, anatomy_bound, joint_width
from federation.plan.plan import ProbePlan, RunPlan, StylePlan, TrainingPlan
from meduet_models.content_code import public_code
from meduet_models.erasure import ErasureMoments
from scans.volume_plan import VolumePlan
from server.exchanges.directions import directions_of_sums
from tests.worlds import small_network, small_plan

FOLDS = 4
WIDTH, TOKENS = 8, 12
CODE = public_code(
    torch.randn(100, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4)), TOKENS, WIDTH, WIDTH
)


def a_plan(**anatomy: tuple[float, float]) -> RunPlan:
    network = small_network(width=WIDTH, code_size=WIDTH)
    return small_plan(
        name="toy",
        seed=0,
        sites=("north", "south"),
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=network,
        training=TrainingPlan(rounds=1, steps_per_round=1),
        style=StylePlan(),
        probes=ProbePlan(every_rounds=1, folds=FOLDS, anatomy=anatomy),
    )


def found_directions(sums: dict[str, Any], plan: RunPlan) -> dict[str, torch.Tensor]:
    """Directions of tokens, read by the code again."""
    found = directions_of_sums(sums, plan, CODE)
    assert all(moved.shape == (TOKENS, WIDTH) for moved in found.values())
    return {
        name: (CODE.read(moved[None]) - CODE.read(torch.zeros_like(moved)[None]))[0]
        for name, moved in found.items()
    }


def site_sums(plan: RunPlan, content: torch.Tensor, natural: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a site tells: content, a style that knows nothing, and targets mapped to [-1, 1]."""
    style = torch.zeros(len(content), plan.network.style_width)
    ranges = plan.probes.anatomy
    mapped = [2 * (natural[n] - low) / (high - low) - 1 for n, (low, high) in ranges.items()]
    joint = torch.cat([content, style, torch.stack(mapped, 1)], 1)
    assert float(joint.norm(dim=1).max()) < anatomy_bound(plan)  # nobody is scaled down
    folds = [
        ErasureMoments.of(joint[f::FOLDS], [str(i) for i in range(len(joint[f::FOLDS]))], anatomy_bound(plan))
        for f in range(FOLDS)
    ]
    return {ANATOMY: torch.stack([fold.to_vector() for fold in folds])}


def population(
    site: int, slope: torch.Tensor, count: int = 400
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Patients whose content moves by `slope` per year; the older site also has another mean content."""
    draws = torch.Generator().manual_seed(site)
    age = 40 + 30 * site + 8 * torch.randn(count, generator=draws)
    mixing = torch.eye(WIDTH) + 0.5 * torch.ones(WIDTH, WIDTH)  # what is not age is correlated
    rest = 0.05 * torch.randn(count, WIDTH, generator=draws) @ mixing
    shift = torch.linspace(1, -1, WIDTH) * site
    content = (age - 50)[:, None] * slope + rest + shift
    return content, {"age": age, "coin": torch.rand(count, generator=draws)}


def test_a_direction_is_the_change_of_content_per_year_whatever_the_sites_differ_in() -> None:
    plan = a_plan(age=(0.0, 120.0))
    slope = torch.tensor([0.02, -0.01, 0.0, 0.0, 0.015, 0.0, 0.0, 0.005])
    sums = {site: site_sums(plan, *population(i, slope)) for i, site in enumerate(plan.sites)}
    found = found_directions(sums, plan)["age"]
    # Standard error of a slope: .08 of noise per channel over 8 years and 800 patients, about 4e-4.
    assert torch.allclose(found, slope, atol=2e-3)
    # Without taking site means out, the older site's other content would be taken for age.
    content, ages = (
        torch.cat([population(i, slope)[0] for i in range(2)]),
        torch.cat([population(i, slope)[1]["age"] for i in range(2)]),
    )
    naive = ((ages - ages.mean())[:, None] * (content - content.mean(0))).mean(0) / ages.var()
    assert float((naive - slope).norm()) > 10 * float((found - slope).norm())


def test_the_direction_does_not_depend_on_the_range_that_the_plan_maps() -> None:
    slope = torch.full((WIDTH,), 0.01)
    found = []
    for high in (120.0, 240.0):
        plan = a_plan(age=(0.0, high))
        sums = {site: site_sums(plan, *population(i, slope)) for i, site in enumerate(plan.sites)}
        found.append(found_directions(sums, plan)["age"])
    assert torch.allclose(found[0], found[1], rtol=1e-4)


def test_what_content_does_not_tell_has_no_direction() -> None:
    plan = a_plan(age=(0.0, 120.0), coin=(0.0, 1.0))
    slope = torch.full((WIDTH,), 0.02)
    sums = {site: site_sums(plan, *population(i, slope)) for i, site in enumerate(plan.sites)}
    assert set(found_directions(sums, plan)) == {"age"}


def test_sites_that_withhold_anatomy_leave_the_directions_of_the_others() -> None:
    plan = a_plan(age=(0.0, 120.0))
    slope = torch.full((WIDTH,), 0.02)
    sums = site_sums(plan, *population(0, slope))
    nobody = ErasureMoments.none(joint_width(plan) + 1, anatomy_bound(plan)).to_vector()
    withheld = {ANATOMY: nobody.expand(FOLDS, -1).clone()}
    both = found_directions({"north": sums, "south": withheld}, plan)
    assert torch.equal(both["age"], found_directions({"north": sums}, plan)["age"])
    assert found_directions({"south": withheld}, plan) == {}
    without = dataclasses.replace(plan, probes=ProbePlan())
    assert found_directions({"north": {}}, without) == {}


def test_the_same_target_everywhere_has_no_direction() -> None:
    plan = a_plan(age=(0.0, 120.0))
    content, known = population(0, torch.zeros(WIDTH))
    sums = {"north": site_sums(plan, content, {"age": torch.full_like(known["age"], 50.0)})}
    with pytest.raises(KeyError):
        found_directions(sums, plan)["age"]
