from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.exchanges.latents import (
    LatentsAsk,
    LatentsReply,
    ToldLatents,
    from_tensors,
    items_per_chunk,
    largest_latents,
    latent_bound,
    nothing,
    opened,
    packed,
    releases_of,
    to_tensors,
    unpacked,
)
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import ReleasePlan, RunPlan, StylePlan, TrainingPlan
from federation.wire.messages import MessageError
from federation.wire.sealing import SealBroken, recipient_key
from federation.wire.wire import arrays_bytes
from meduet_models.diffusion.conditions import Examples
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from meduet_models.weights import written
from scans.volume_plan import VolumePlan
from tests.worlds import BANK_KEY, RECIPIENT, small_network, small_plan

KEY = recipient_key(BANK_KEY)

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


def told(count: int = 3, labels: bool = True, **changes: Any) -> ToldLatents:
    items = tuple(f"{n:032x}" for n in range(count))
    made = ToldLatents(
        plan_sha256="a", site="north", round=2, first=4, total=9, items=items, examples=some(count, labels)
    )
    return replace(made, **changes)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_reply_opens_as_it_was_sealed(count: int, labels: bool) -> None:
    reply = told(count, labels)
    came = LatentsReply.from_record(reply.sealed_to(RECIPIENT).to_record())
    back = opened(came, KEY)
    assert (back.site, back.round, back.first, back.total) == ("north", 2, 4, 9) and back.items == reply.items
    same(back.examples, reply.examples)


def test_in_bfloat16_latents_are_rounded_and_what_is_known_of_a_scan_is_not() -> None:
    examples = replace(some(), site=torch.tensor([257, 2**30 + 1, 0]))
    back = opened(told(examples=examples, wire_dtype="bfloat16").sealed_to(RECIPIENT), KEY)
    assert torch.equal(back.examples.latents, examples.latents.bfloat16().float())
    assert back.examples.site.tolist() == [257, 2**30 + 1, 0]
    torch.testing.assert_close(back.examples.spacing, examples.spacing, rtol=0, atol=0, equal_nan=True)


def test_a_sealed_reply_is_no_longer_than_the_largest_that_is_pulled() -> None:
    for labels in (0, 3):
        plan = a_plan(labels=labels, **({"conditions": ("label_map",)} if labels else {}))
        ask = LatentsAsk(plan_json=plan.to_json(), round=1, first=0, count=3)
        for wire_dtype in ("float32", "bfloat16"):
            dressed = replace(plan, release=ReleasePlan(wire_dtype=wire_dtype))
            record = told(3, bool(labels), wire_dtype=wire_dtype).sealed_to(RECIPIENT).to_record()
            assert arrays_bytes(record) <= largest_latents(dressed, ask).array_bytes


CHANGES: dict[str, Callable[[LatentsReply], LatentsReply]] = {
    "another plan": lambda r: replace(r, plan_sha256="b"),
    "another site": lambda r: replace(r, site="south"),
    "another round": lambda r: replace(r, round=3),
    "another place": lambda r: replace(r, first=5),
    "another total": lambda r: replace(r, total=10),
    "other names": lambda r: replace(r, items=tuple(reversed(r.items))),
    "another type": lambda r: replace(r, wire_dtype="bfloat16"),
    "the first byte": lambda r: replace(r, sealed=bytes([r.sealed[0] ^ 1]) + r.sealed[1:]),
    "the last byte": lambda r: replace(r, sealed=r.sealed[:-1] + bytes([r.sealed[-1] ^ 1])),
    "cut": lambda r: replace(r, sealed=r.sealed[:-1]),
    "nothing": lambda r: replace(r, sealed=b""),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_was_sealed_opens_in_its_own_place_and_whole_only(
    change: Callable[[LatentsReply], LatentsReply],
) -> None:
    reply = told().sealed_to(RECIPIENT)
    assert opened(reply, KEY)
    with pytest.raises(SealBroken, match="does not open") as refused:
        opened(change(reply), KEY)
    assert "\n" not in str(refused.value)


def test_no_other_key_opens_it_and_two_seals_of_the_same_differ() -> None:
    one, two = (told().sealed_to(RECIPIENT) for _ in range(2))
    assert one.sealed != two.sealed
    with pytest.raises(SealBroken):
        opened(one, recipient_key(bytes(32)))


def test_a_question_comes_back_as_it_was_sent() -> None:
    ask = LatentsAsk(plan_json=a_plan().to_json(), round=3, first=5, count=7)
    assert LatentsAsk.from_record(ask.to_record()) == ask


def broken(what: str) -> bytes:
    tensors = to_tensors(some())
    match what:
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
        case "a type":
            tensors["latents"] = tensors["latents"].double()
        case "nothing":
            tensors = {}
    header, values = written(tensors, {})
    return b"".join([header, *values])


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("a fraction", "category to be whole"),
        ("too large", "site to be whole"),
        ("lengths", "as many of each"),
        ("absent", "Expected the tensors"),
        ("unknown", "Expected the tensors"),
        ("axes", "Expected the tensors"),
        ("a type", "in another type"),
        ("nothing", "Expected the tensors"),
    ],
)
def test_sealed_examples_that_are_none_are_refused_in_one_line(what: str, why: str) -> None:
    unpacked(broken("as it should be"), "float32")
    with pytest.raises(MessageError, match=why) as refused:
        unpacked(broken(what), "float32")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("items", "why"),
    [(("patient Jane", "1" * 32), "32 hex digits"), (("0" * 32, "0" * 32), "each item once")],
)
def test_names_that_are_none_are_refused(items: tuple[str, ...], why: str) -> None:
    with pytest.raises(MessageError, match=why):
        LatentsReply.from_record(told(2, items=items).sealed_to(RECIPIENT).to_record())
    with pytest.raises(MessageError, match="as many examples as items"):
        opened(told(3, items=("0" * 32,)).sealed_to(RECIPIENT), KEY)


def test_bytes_that_nobody_foresaw_are_refused_or_are_examples() -> None:
    """Who has the public key, that is everybody, can seal whatever he likes."""
    whole, random = packed(some(), "float32"), np.random.default_rng(0)
    accepted = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            place = int(random.integers(400 if random.random() < 0.8 else len(content)))
            content[place] = int(random.integers(256))
        cut = (
            bytes(content[: int(random.integers(len(content)))]) if random.random() < 0.1 else bytes(content)
        )
        try:
            accepted += len(unpacked(cut, "float32")) == 3
        except MessageError as error:
            assert "\n" not in str(error)
    assert 0 < accepted < 2000


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
