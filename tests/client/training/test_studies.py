"""Several plans at one site: states apart, one ledger, one ceiling, and nobody touches another's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.consent.approvals import Approvals
from client.exchanges import pretraining, style_code
from client.release import Released
from client.training.site_state import StateFolder
from federation.exchanges.style_code import CODE, StyleCodeAsk
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan
from privacy.ledger import LedgerRefusal
from tests.client.training.killed_site import ToySite, same
from tests.worlds import Hospital, ViewedScans, protected_plan, public_latents


def named(plan: RunPlan, name: str) -> RunPlan:
    return dataclasses.replace(plan, name=name)


def test_the_third_plan_is_refused_at_the_ceiling_that_all_share(
    toy_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    public = public_latents()
    plans = [named(protected_plan(public, toy_plan, epsilon=3.0), name) for name in ("one", "two", "three")]
    site = Hospital(tmp_path, ViewedScans.of([f"p{n}" for n in range(20)]), epsilon_ceiling=5.0)

    def answer(plan: RunPlan) -> Released:
        ask = StyleCodeAsk(plan_json=plan.to_json(), public={"latents": public})
        return style_code.ANSWER.once(site, ask, plan)

    first, second = answer(plans[0]), answer(plans[1])
    assert 4.0 < site.ledger.spent().total.upper <= 5.0  # two of 3.0 each, composed
    read = list(site.held.asked)
    with pytest.raises(LedgerRefusal, match="ceiling is 5"):
        answer(plans[2])
    assert site.held.asked == read  # no scan was read for it
    assert torch.equal(answer(plans[0]).tensors[CODE], first.tensors[CODE])  # and the others go on
    assert torch.equal(answer(plans[1]).tensors[CODE], second.tensors[CODE])
    alone = Hospital(tmp_path / "alone", ViewedScans.of([f"p{n}" for n in range(20)]), epsilon_ceiling=5.0)
    ask = StyleCodeAsk(plan_json=plans[2].to_json(), public={"latents": public})
    style_code.ANSWER.once(alone, ask, plans[2])  # it was the others' charges that were in its way


def test_two_plans_in_turn_leave_what_each_would_alone(
    toy_plan: Callable[..., RunPlan], site: Callable[..., ToySite], ask: Callable[..., object]
) -> None:
    one = toy_plan(name="one")
    other = dataclasses.replace(one, name="other", seed=8)
    together, alone = site("together"), site("alone")
    for number in (1, 2):
        question = ask(one, number)
        undisturbed = pretraining.ANSWER.once(alone, question, one)
        pretraining.ANSWER.once(together, ask(other, number), other)
        assert same(pretraining.ANSWER.once(together, question, one).tensors, undisturbed.tensors)
    kept = [StateFolder(s.state_dir / "state", one.sha256).before(3).sha256 for s in (together, alone)]
    assert kept[0] == kept[1] != ""
    assert together.ledger.verify() == 8 and alone.ledger.verify() == 4  # one ledger for both
    assert {e.record["plan"] for e in together.journal.entries()} == {one.sha256, other.sha256}


def test_a_plan_that_is_approved_or_withdrawn_leaves_the_others_as_they_are(
    toy_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    book = Approvals(tmp_path)
    plans = [
        PublishedPlan(plan=named(toy_plan(), name), bundle_sha256="b" * 64)
        for name in ("one", "two", "three")
    ]
    agreed = [None, None, None]
    for number, plan in enumerate(plans):
        book.approve(plan)
        agreed[number] = "b" * 64  # type: ignore[call-overload]
        assert [book.approved_bundle(one.sha256) for one in plans] == agreed
    book.withdraw(plans[1])
    assert [book.approved_bundle(one.sha256) for one in plans] == ["b" * 64, None, "b" * 64]
