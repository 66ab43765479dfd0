from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from client.latents.batches import Batches
from client.training.style_axes import with_style_axes
from federation.plan.plan import AggregationPlan, RunPlan
from meduet_models.meduet import MeDUET
from meduet_models.sharing import home_keys, shared_keys

PATIENTS = [f"p{n}" for n in range(10)]
AXES = ("axes_centre", "axes_read", "axes_back", "beside")


def start(plan: RunPlan) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    weights, method = model.state_dict(), plan.aggregation.method
    shared, home = (keys(model, plan.style.head, method) for keys in (shared_keys, home_keys))
    return {n: weights[n] for n in shared}, {n: weights[n] for n in home}


def fitted(plan: RunPlan, scans: Any, bank: Any) -> dict[str, torch.Tensor]:
    shared, home = start(plan)
    return with_style_axes(home, shared, lambda: Batches(scans, plan, bank), plan)


def changed(plan: RunPlan, scans: Any, bank: Any) -> set[str]:
    _, home = start(plan)
    return {n for n, t in fitted(plan, scans, bank).items() if not torch.equal(t, home[n])}


def test_axes_stay_at_the_site_and_change_nothing_else(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    plan = toy_plan()
    moved = changed(plan, toy_scans(PATIENTS), toy_bank(plan))
    assert moved == {f"style_head.{name}" for name in AXES}
    assert not any(name.startswith("style_head.") for name in start(plan)[0])


def test_the_same_scans_give_the_same_axes_to_the_bit_whatever_the_threads(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    plan, found = toy_plan(), []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(fitted(plan, toy_scans(PATIENTS), toy_bank(plan)))
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_style_of_the_bank_gives_the_tokens_of_its_own_statistics(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    """What sites differ in passes; a scan's own deviation from its site's style does not."""
    plan, scans = toy_plan(), toy_scans(PATIENTS)
    shared, _ = start(plan)
    network = MeDUET(plan.network, len(plan.sites), seed=plan.seed)
    network.load_state_dict({**shared, **fitted(plan, scans, toy_bank(plan))})
    batches = Batches(scans, plan, toy_bank(plan))
    rows = list(scans.indices("train"))
    with torch.inference_mode():
        styles = [network.encode(batches.in_style(rows, style)).style.flatten(1) for style in batches.styles]
    between = torch.stack([s.mean(0) for s in styles]).var(0).sum()
    within = torch.stack([s.var(0) for s in styles]).mean(0).sum()
    assert float(between) > 5 * float(within)


def test_there_are_none_where_style_heads_are_shared_or_there_is_no_bank(
    toy_plan: Callable[..., RunPlan], toy_scans: Any, toy_bank: Any
) -> None:
    shared_head = toy_plan(style=replace(toy_plan().style, head="shared", anchor=0.0))
    averaged = toy_plan(style=shared_head.style, aggregation=AggregationPlan(method="fedavg"))
    for plan in (shared_head, averaged):
        assert not changed(plan, toy_scans(PATIENTS), toy_bank(plan))
    assert not changed(toy_plan(), toy_scans(PATIENTS), None)
