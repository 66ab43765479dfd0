from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.diffusion_plan import DiffusionPlan
from federation.exchanges.latents import (
    LatentsAsk,
    LatentsReply,
    from_tensors,
    items_per_chunk,
    latent_bound,
    nothing,
    releases_of,
    to_tensors,
)
from federation.messages import MessageError
from federation.plan import RunPlan, StylePlan, TrainingPlan
from federation.wire import array_record
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from scans.volume_plan import VolumePlan
from tests.worlds import small_network, small_plan

DIFFUSION = DiffusionPlan(
    policy="raw",
    transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
    training=DiffusionTraining(),
)


def a_plan(rounds: int = 4, **diffusion: Any) -> RunPlan:
    return small_plan(
        name="toy",
        seed=7,
        sites=("north", "south"),
        volumes=VolumePlan(modality="mr", shape=(16, 24, 16)),
        network=small_network(width=16),
        training=TrainingPlan(rounds=rounds, steps_per_round=2, batch_size=4),
        style=StylePlan(minimum_cohort=3),
        diffusion=replace(DIFFUSION, **diffusion),
    )


def a_federated_plan() -> RunPlan:
    return replace(a_plan(), diffusion=replace(DIFFUSION, policy="federated", rounds=3))


def some(count: int = 3, labels: bool = True) -> Examples:
    draws = torch.Generator().manual_seed(count)
    shares = torch.rand(count, 3, 4, 6, 4, generator=draws).softmax(1)
    if count:
        shares[0] = torch.nan
    spacing = torch.rand(count, 3, generator=draws) + 0.3
    spacing[1:2] = torch.nan
    return Examples(
        latents=torch.randn(count, 2, 4, 6, 4, generator=draws),
        site=torch.arange(count),
        body_part=torch.arange(count) - 1,
        spacing=spacing,
        category=torch.full((count,), 7),
        label_map=shares if labels else None,
    )


def same(one: Examples, other: Examples) -> None:
    for name in ("latents", "site", "body_part", "spacing", "category", "label_map"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_reply_comes_back_as_it_was_sent(count: int, labels: bool) -> None:
    items = tuple(f"{n:032x}" for n in range(count))
    reply = LatentsReply(
        plan_sha256="a", site="north", round=2, first=4, total=9, items=items, examples=some(count, labels)
    )
    back = LatentsReply.from_record(reply.to_record())
    assert (back.site, back.round, back.first, back.total, back.items) == ("north", 2, 4, 9, items)
    same(back.examples, reply.examples)


def test_in_bfloat16_latents_are_rounded_and_what_is_known_of_a_scan_is_not() -> None:
    reply = LatentsReply(
        plan_sha256="a",
        site="north",
        round=1,
        first=0,
        total=3,
        items=tuple(f"{n:032x}" for n in range(3)),
        examples=replace(some(), site=torch.tensor([257, 2**30 + 1, 0])),
        wire_dtype="bfloat16",
    )
    back = LatentsReply.from_record(reply.to_record())
    assert torch.equal(back.examples.latents, reply.examples.latents.bfloat16().float())
    assert back.examples.site.tolist() == [257, 2**30 + 1, 0]
    torch.testing.assert_close(back.examples.spacing, reply.examples.spacing, rtol=0, atol=0, equal_nan=True)


def test_a_question_comes_back_as_it_was_sent() -> None:
    ask = LatentsAsk(plan_json=a_plan().to_json(), round=3, first=5, count=7)
    assert LatentsAsk.from_record(ask.to_record()) == ask


def broken(what: str) -> RecordDict:
    items = ("0" * 32, "1" * 32, "2" * 32)
    tensors = to_tensors(some())
    match what:
        case "a name":
            items = ("patient Jane", *items[1:])
        case "twice":
            items = (items[0], items[0], items[2])
        case "fewer":
            items = items[:2]
        case "a fraction":
            tensors["category"] = tensors["category"] + 0.5
        case "too large":
            tensors["site"] = tensors["site"] + 2.0**40
        case "lengths":
            tensors["spacing"] = tensors["spacing"][:2]
        case "absent":
            del tensors["body_part"]
        case "unknown":
            tensors["patient"] = tensors["site"]
        case "axes":
            tensors["site"] = tensors["site"][:, None]
    reply = LatentsReply(
        plan_sha256="a", site="north", round=1, first=0, total=3, items=items, examples=some()
    ).to_record()
    reply["told"] = array_record(tensors)
    return reply


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("a name", "32 hex digits"),
        ("twice", "each item once"),
        ("fewer", "as many examples as items"),
        ("a fraction", "category to be whole"),
        ("too large", "site to be whole"),
        ("lengths", "as many of each"),
        ("absent", "Expected the tensors"),
        ("unknown", "Expected the tensors"),
        ("axes", "Expected the tensors"),
    ],
)
def test_a_reply_that_is_not_one_is_refused_in_one_line(what: str, why: str) -> None:
    with pytest.raises(MessageError, match=why) as refused:
        LatentsReply.from_record(broken(what))
    assert "\n" not in str(refused.value)


def test_an_empty_answer_is_examples_of_nobody() -> None:
    examples = from_tensors(nothing(a_plan(labels=3, conditions=("label_map",))))
    assert (
        len(examples) == 0 and examples.label_map is not None and examples.label_map.shape == (0, 3, 4, 6, 4)
    )


@settings(max_examples=60, deadline=None)
@given(
    available=st.integers(0, 40),
    per_site=st.integers(0, 30),
    per_round=st.integers(0, 9),
    begin=st.integers(1, 4),
)
def test_rounds_release_each_item_once_within_both_quotas(
    available: int, per_site: int, per_round: int, begin: int
) -> None:
    plan = a_plan(begin_round=begin, items_per_site=per_site, items_per_round=per_round)
    released = [list(releases_of(plan, round_number, available)) for round_number in range(begin, 5)]
    assert all(len(own) <= per_round for own in released if per_round)
    everything = [place for own in released for place in own]
    most = min(available, per_site or available)
    assert everything == list(range(len(everything)))
    assert len(everything) == min(most, len(released) * per_round if per_round else most)


def test_a_round_or_a_plan_that_releases_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="round from 2 to 4; got 1"):
        releases_of(a_plan(begin_round=2), 1, 5)
    with pytest.raises(ValueError, match="its policy is federated"):
        releases_of(a_federated_plan(), 1, 5)
    with pytest.raises(ValueError, match="its policy is none"):
        latent_bound(replace(a_plan(), diffusion=None))


def test_the_bound_is_the_plans_root_mean_square_and_a_chunk_is_32_mib() -> None:
    plan = a_plan(latent_clip=1.5)
    assert latent_bound(plan) == pytest.approx(float(torch.full((2, 4, 6, 4), 1.5).norm()))
    assert items_per_chunk(plan) == 2**25 // (4 * (2 * 96 + 6))
