"""Released latents: the question, the answer, and what both sides must agree on about them.

A site is asked for a part of what it releases in a round: items `first` to `first + count`, and says how many
there are. An item is a training scan under an opaque name. Its latents leave the site sealed to the bank's
key (`federation/wire/sealing.py`), which the plan names: whatever lies between sees no latent. The same
question has the same answer, so a collection that was cut off goes on where it stood. What this file does not
do: it decides nothing for a site (`client/exchanges/latents.py`) and stores nothing
(`server/latent_bank/bank.py`).

Axes: b = items, c d h w = latents, l = label values.
"""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Annotated

import safetensors.torch
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors import SafetensorError
from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import RunPlan, WireDtype
from federation.wire.limits import Largest, largest_reply, promised
from federation.wire.messages import Ask, Converted, Reply, Scalar, SealedBytes
from federation.wire.sealing import OVERHEAD_BYTES, seal, unseal
from federation.wire.wire import MessageError, Tensors
from forms.json_text import canonical
from meduet_models.diffusion.conditions import Examples
from meduet_models.weights import written
from privacy.promise import Promise

BOUNDED = "latents"
"""The tensor that the release bounds; the others say what is known of a scan."""
_CHUNK_BYTES = 32 * 2**20
_ITEM = re.compile(r"[0-9a-f]{32}")
_ITEM_BYTES = 33  # a name and a space
_HEADER_BYTES = 1024  # of `packed`, more than it takes
_WHOLE = ("site", "body_part", "category")
_REAL = (BOUNDED, "label_map")


def is_item(name: str) -> bool:
    """Whether this can be the name of an item."""
    return _ITEM.fullmatch(name) is not None


def _names(joined: str) -> tuple[str, ...]:
    items = tuple(joined.split())
    if len(set(items)) < len(items) or not all(map(is_item, items)):
        raise MessageError("Expected each item once, under a name of 32 hex digits; got another.")
    return items


def to_tensors(examples: Examples) -> Tensors:
    """Examples as finite tensors: whole numbers and spacing as float64, so that they travel exactly.

    An unknown spacing or label map (NaN) becomes zeros, which no known one is.
    """
    tensors = {
        BOUNDED: examples.latents,
        **{name: getattr(examples, name).double() for name in _WHOLE},
        "spacing": torch.nan_to_num(examples.spacing.double(), nan=0.0),
    }
    if examples.label_map is not None:
        tensors["label_map"] = torch.nan_to_num(examples.label_map, nan=0.0)
    return tensors


def from_tensors(tensors: Tensors) -> Examples:
    """The inverse of `to_tensors`; raises `MessageError` for tensors that no examples become."""
    maps = tensors.get("label_map")
    ranks = {BOUNDED: 5, **{name: 1 for name in _WHOLE}, "spacing": 2} | (
        {} if maps is None else {"label_map": 5}
    )
    if {name: tensor.ndim for name, tensor in tensors.items()} != ranks:
        raise MessageError(
            f"Expected the tensors {', '.join(ranks)}; got {', '.join(sorted(tensors)) or 'none'}."
        )
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        raise MessageError("Expected as many of each tensor as there are items.")
    whole = {name: _whole(name, tensors[name]) for name in _WHOLE}
    spacing = tensors["spacing"].float()
    if maps is not None:
        maps = _unknown(maps, (1, 2, 3, 4))
    return Examples(latents=tensors[BOUNDED], spacing=_unknown(spacing, (1,)), label_map=maps, **whole)


def _whole(name: str, tensor: Tensor) -> Tensor:
    if not bool(((tensor == tensor.round()) & (tensor.abs() < 2**31)).all()):
        raise MessageError(f"Expected {name} to be whole numbers; got others.")
    return tensor.long()


def _unknown(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """NaN where a sample is zero throughout."""
    return tensor.masked_fill((tensor == 0).all(dim=axes, keepdim=True), torch.nan)


@dataclass(frozen=True, kw_only=True)
class LatentsAsk(Ask, kind="latents_ask"):
    """Tell items `first` to `first + count` of what you release in this round."""

    round: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class LatentsReply(Reply, kind="latents_reply"):
    """A part of what a site releases in a round, sealed to the bank's key. Patient data, where the policy
    says so."""

    round: int
    first: int
    """Place of the first of `items` among what the site releases in this round."""
    total: int
    """How many items that is."""
    items: Annotated[tuple[str, ...], Converted(" ".join, _names, Scalar(str))]
    """Opaque names, 32 hex digits each."""
    sealed: Annotated[bytes, SealedBytes()]
    """As many examples, in the form of `packed`, for the recipient that the plan names."""
    wire_dtype: WireDtype = "float32"
    """How latents and label maps travel; they are float32 on both ends."""


@dataclass(frozen=True, kw_only=True)
class ToldLatents:
    """The same in clear: as the gate let it out, or as the bank opened it."""

    plan_sha256: str
    site: str
    round: int
    first: int
    total: int
    items: tuple[str, ...]
    examples: Examples
    wire_dtype: WireDtype = "float32"

    def sealed_to(self, recipient: str) -> LatentsReply:
        """The reply that only the holder of this key reads. Raises `ValueError` for a key that is none."""
        facts = {
            name: getattr(self, name)
            for name in ("plan_sha256", "site", "round", "first", "total", "items", "wire_dtype")
        }
        return LatentsReply(
            sealed=seal(packed(self.examples, self.wire_dtype), recipient, _purpose(**facts)), **facts
        )


def opened(reply: LatentsReply, key: X25519PrivateKey) -> ToldLatents:
    """What a reply holds. Raises `SealBroken`, and `MessageError` for examples that are none."""
    facts = {f.name: getattr(reply, f.name) for f in fields(reply) if f.name != "sealed"}
    examples = unpacked(unseal(reply.sealed, key, _purpose(**facts)), reply.wire_dtype)
    if len(examples) != len(reply.items):
        raise MessageError(f"Expected as many examples as items; got {len(examples)} and {len(reply.items)}.")
    return ToldLatents(examples=examples, **facts)


def _purpose(**facts: object) -> bytes:
    """What a sealed reply belongs to: under another plan, site, round or name it does not open."""
    return canonical({"purpose": "fedmeduet released latents", **facts}).encode()


def packed(examples: Examples, wire_dtype: WireDtype) -> bytes:
    """Examples as bytes, as a file of weights has them."""
    narrow = torch.bfloat16 if wire_dtype == "bfloat16" else torch.float32
    tensors = {
        name: tensor.to(narrow) if name in _REAL else tensor for name, tensor in to_tensors(examples).items()
    }
    header, values = written(tensors, {})
    return b"".join([header, *values])


def unpacked(content: bytes, wire_dtype: WireDtype) -> Examples:
    """The inverse of `packed`; raises `MessageError`."""
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MessageError("Expected sealed examples; what was sealed is something else.") from error
    narrow = torch.bfloat16 if wire_dtype == "bfloat16" else torch.float32
    for name, tensor in tensors.items():
        if tensor.dtype != (narrow if name in _REAL else torch.float64):
            raise MessageError(f"Expected {name[:40]!r} in another type than {tensor.dtype}.")
    return from_tensors({n: t.float() if n in _REAL else t for n, t in tensors.items()})


def releasing(plan: RunPlan) -> DiffusionPlan:
    """The diffusion model's part of a plan under which latents leave; raises `ValueError` for another."""
    if plan.diffusion is None or not plan.diffusion.release.releases_latents:
        policy = "none" if plan.diffusion is None else plan.diffusion.policy
        raise ValueError(f"Expected a plan under which sites release latents; its policy is {policy}.")
    return plan.diffusion


def banked(plan: RunPlan) -> DiffusionPlan:
    """The diffusion model's part of a plan under which latents come into the centre's bank, patients' or
    not; raises `ValueError` for another."""
    if plan.diffusion is None or plan.diffusion.release.trained_at != "centre":
        raise ValueError(
            "Expected a plan whose diffusion model is trained at the centre; its policy is "
            f"{plan.latent_policy.name}."
        )
    return plan.diffusion


def releases_of(plan: RunPlan, round_number: int, available: int) -> range:
    """Which of `available` scans leave in a round, by their place in the site's fixed order.

    Raises `ValueError` for a plan without release, and for a round in which it releases nothing.
    """
    diffusion = releasing(plan)
    if not diffusion.begin_round <= round_number <= plan.training.rounds:
        raise ValueError(
            f"Expected a round from {diffusion.begin_round} to {plan.training.rounds}; got {round_number}."
        )
    limit = min(available, diffusion.items_per_site or available)
    share = diffusion.items_per_round or limit
    before = (round_number - diffusion.begin_round) * share
    return range(min(before, limit), min(before + share, limit))


def latent_bound(plan: RunPlan) -> float:
    """L2 norm that the latents of one scan, or sample, may have: the plan's root mean square over all their
    values."""
    return banked(plan).latent_clip * math.sqrt(plan.network.latent_channels * math.prod(_grid(plan)))


def told_shapes(plan: RunPlan, count: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels for `count` items."""
    shapes: dict[str, tuple[int, ...]] = {
        BOUNDED: (count, plan.network.latent_channels, *_grid(plan)),
        "site": (count,),
        "body_part": (count,),
        "spacing": (count, 3),
        "category": (count,),
    }
    if labels := banked(plan).labels:
        shapes["label_map"] = (count, labels, *_grid(plan))
    return shapes


def items_per_chunk(plan: RunPlan) -> int:
    """Most items in one answer: 32 MiB of them, at least one."""
    return max(1, _CHUNK_BYTES // (4 * sum(math.prod(shape) for shape in told_shapes(plan, 1).values())))


def largest_latents(plan: RunPlan, ask: LatentsAsk) -> Largest:
    """Size of a site's answer, at most."""
    return largest_sealed(plan, ask.count)


def largest_sealed(plan: RunPlan, count: int) -> Largest:
    """Size of an answer of so many items, sealed, at most; their names are text."""
    shapes = told_shapes(plan, count)
    real = {name: shape for name, shape in shapes.items() if name in _REAL}
    others = {name: shape for name, shape in shapes.items() if name not in _REAL}
    tensors = promised(real, torch.float32) | promised(others, torch.float64)
    clear = largest_reply(tensors, plan.release.latent_dtype, text_bytes=_ITEM_BYTES * count)
    return replace(clear, array_bytes=clear.array_bytes + _HEADER_BYTES + OVERHEAD_BYTES)


def nothing(plan: RunPlan) -> Tensors:
    """What travels when there is no item."""
    return {
        name: torch.zeros(shape, dtype=torch.float32 if name in _REAL else torch.float64)
        for name, shape in told_shapes(plan, 0).items()
    }


def _grid(plan: RunPlan) -> tuple[int, int, int]:
    return plan.network.latent_grid


def latents_rounds(plan: RunPlan) -> range:
    """The rounds of a plan in which latents leave."""
    if plan.diffusion is None or not plan.diffusion.release.releases_latents:
        return range(0)
    return range(plan.diffusion.begin_round, plan.training.rounds + 1)


def latents_promise(plan: RunPlan, ask: LatentsAsk) -> Promise:
    """Each scan's latents are bounded by themselves. Raises `ValueError` as `releasing`."""
    return Promise(kind="latents", bound=latent_bound(plan), unit="scan", enforcement="each")


def latents_part(plan: RunPlan, ask: LatentsAsk) -> str:
    """Which items; raises `ValueError` when these are more than one answer holds."""
    most = items_per_chunk(plan)
    if ask.first < 0 or not 1 <= ask.count <= most:
        raise ValueError(
            f"Expected 1 to {most} items from the 0th or a later one; got {ask.count} from {ask.first}."
        )
    return f"{ask.first}_{ask.count}"


LATENTS = Exchange(
    route="query.latents",
    ask=LatentsAsk,
    reply=LatentsReply,
    rounds=latents_rounds,
    largest=largest_latents,
    promise=latents_promise,
    part=latents_part,
)
