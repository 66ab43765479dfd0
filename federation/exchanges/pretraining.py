"""A round of pretraining: train from these shared weights; what comes back is a vector of sums.

What this file does not do: it trains nothing (`client/training/pretraining.py`), averages nothing
(`strategies/content_share.py`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor

from federation.exchanges.exchange import Exchange
from federation.plan.plan import RunPlan
from federation.wire.limits import largest_reply
from federation.wire.messages import Arrays, Ask, Metrics, Reply, RoundedTensors, Tensors, WireDtype
from federation.wire.wire import rounded
from meduet_models.weights import sha256_of_tensors
from privacy.promise import Promise

LEVELS = "embed_volume.levels."
"""What the names of a U-Net's weights begin with in the network of `network.encoder=volume_unet`."""


@dataclass(frozen=True, kw_only=True)
class TrainAsk(Ask, kind="train_ask"):
    """One round: train from these shared weights, with this style bank.

    `home` is the common start of what stays at the sites; it comes with round 1, or later to a site that
    missed it, and the site keeps it. `wire_dtype` is how the shared weights travel; they arrive as views of
    the received bytes, which nothing may write.
    """

    round: int
    shared: Annotated[Tensors, Arrays(rounded=True, view=True)]
    bank: Tensors
    home: Tensors | None = None
    wire_dtype: WireDtype = "float32"

    def sha256(self) -> str:
        """As `Ask`; a start that comes after round 1 is no part of the question: a site that has one does not
        look at it, and one that lost its own is asked the same again, with a start."""
        asked = dataclasses.replace(self, home=None) if self.round > 1 else self
        return Ask.sha256(asked)


@dataclass(frozen=True, kw_only=True)
class TrainReply(Reply, kind="train_reply"):
    """A site's round: `update` = examples · (weights after - before), a vector of sums.

    `wire_dtype` is how the update travels; it is float32 on both ends. What rounding takes away is a share of
    each value (bfloat16) or of its block's largest (mxint8), whatever `examples` is.
    """

    round: int
    examples: int
    update: RoundedTensors
    metrics: Metrics = field(default_factory=dict)
    wire_dtype: WireDtype = "float32"


def start_sha256(weights: Mapping[str, Tensor], wire_dtype: WireDtype) -> str:
    """Hash of a U-Net's weights as a site gets them: those among `weights` of the network, rounded as they
    travel (what was rounded once stays as it is)."""
    levels = {name: rounded(t, wire_dtype) for name, t in weights.items() if name.startswith(LEVELS)}
    return sha256_of_tensors(levels)


def update_promise(plan: RunPlan) -> Promise:
    """A site's mean update is clipped at the gate."""
    return Promise(kind="round", bound=plan.release.update_clip_norm, unit="site update", enforcement="clip")


def round_promise(plan: RunPlan, ask: TrainAsk) -> Promise:
    """The same in every round."""
    return update_promise(plan)


def rounds_of_updates(plan: RunPlan) -> range:
    """In which rounds an update leaves by itself: none where they leave in secure sums, or under privacy."""
    alone = not plan.aggregation.secure_sum and plan.privacy is None
    return range(1, plan.training.rounds + 1) if alone else range(0)


PRETRAINING = Exchange(
    route="train.round",
    ask=TrainAsk,
    reply=TrainReply,
    rounds=rounds_of_updates,
    largest=lambda plan, ask: largest_reply(ask.shared, ask.wire_dtype),
    promise=round_promise,
)
