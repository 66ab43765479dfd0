"""A whole federation in miniature: a plan, a model of a few numbers, and sites that do arithmetic.

The sites keep their home value on disk per round, as real sites do, and their updates depend on it: a resumed
run that asked a site from the wrong state would end in other weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from federation.exchanges.erasure import ErasureAsk, ErasureReply
from federation.exchanges.pretraining import TrainAsk, TrainReply
from federation.exchanges.survey import SurveyAsk, SurveyReply
from federation.plan.plan import (
    AggregationPlan,
    RunPlan,
    StylePlan,
    TrainingPlan,
)
from federation.wire.messages import Refusal
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from privacy.secure_sum.party import Party
from privacy.secure_sum.ring import Ring
from server.model import Surveyed
from tests.worlds import small_plan

SITES = ("oslo", "lyon", "turin")
Tamper = Callable[[str, str, Any], Any]


def a_plan(rounds: int = 3, sites: tuple[str, ...] = SITES, seed: int = 1, **aggregation: Any) -> RunPlan:
    settings: dict[str, Any] = {"deadline_s": 1.0, **aggregation}
    exchanges = settings.get("method", "content_share") == "content_share"
    return small_plan(
        seed=seed,
        sites=sites,
        objective=ObjectiveConfig(
            weights=LossWeights(invariance=float(exchanges), restyled_reconstruction=float(exchanges))
        ),
        training=TrainingPlan(rounds=rounds, steps_per_round=1),
        style=StylePlan(minimum_cohort=5)
        if exchanges
        else StylePlan(minimum_cohort=5, exchange="none", head="shared", anchor=0.0),
        aggregation=AggregationPlan(**settings),
    )


class TinyModel:
    """A `SharedModel` of three tensors: two shared, one at home."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.surveyed = self.erased = plan.aggregation.method != "alone"

    def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.plan.seed)
        shared = {"weight": torch.randn(3, 4, generator=generator), "constant": torch.zeros(2)}
        home = {"style": torch.randn(5, generator=generator)}
        return (shared, home) if self.plan.aggregation.method != "alone" else ({}, {**shared, **home})

    def check_survey(self, reply: SurveyReply) -> None:
        if set(reply.moments) != {"sums"} or not bool(reply.moments["sums"].isfinite().all()):
            raise ValueError("Expected finite sums.")

    def after_survey(self, shared: dict[str, Tensor], replies: Mapping[str, SurveyReply]) -> Surveyed:
        pooled = torch.stack([reply.moments["sums"] for reply in replies.values()]).sum(0)
        patients = sum(reply.num_patients for reply in replies.values())
        return Surveyed(
            shared | {"constant": pooled / patients}, {"entries": pooled[None]}, {"patients": patients}
        )

    def with_code(self, shared: dict[str, Tensor], style_bank: dict[str, Tensor]) -> dict[str, Tensor]:
        return shared

    def check_erasure(self, reply: ErasureReply) -> None:
        if set(reply.moments) != {"sums"}:
            raise ValueError("Expected sums.")

    def after_erasure(
        self, shared: dict[str, Tensor], replies: Mapping[str, ErasureReply]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        pooled = torch.stack([reply.moments["sums"] for reply in replies.values()]).sum(0)
        return shared | {"constant": shared["constant"] + pooled.float()}, {"rank": 1}

    def provenance(self) -> dict[str, str]:
        return {"model": "tiny"}


def tiny_client(state: Path, sites: tuple[str, ...] = SITES, tamper: Tamper | None = None) -> ClientApp:
    """Sites whose answers are arithmetic; `tamper(site, kind, reply)` may change, refuse or raise."""
    import torch  # named here, as everything else is: the app also travels to Ray's actors

    from meduet_models.weights import load_weights, save_weights

    app = ClientApp()

    def site_of(context: Context) -> tuple[str, int]:
        index = int(context.node_config["partition-id"])
        return sites[index], index

    def sent(message: Message, site: str, kind: str, reply: Any) -> Message:
        reply = reply if tamper is None else tamper(site, kind, reply)
        return Message(reply if not hasattr(reply, "to_record") else reply.to_record(), reply_to=message)

    @app.query("survey")
    def survey(message: Message, context: Context) -> Message:
        ask, (site, index) = SurveyAsk.from_record(message.content), site_of(context)
        reply = SurveyReply(
            plan_sha256=ask.plan_sha256,
            site=site,
            moments={"sums": torch.tensor([1.5, -0.25]) * (index + 1)},
            num_patients=10 + index,
            num_scans=10 + index,
        )
        return sent(message, site, "survey", reply)

    @app.train("round")
    def train(message: Message, context: Context) -> Message:
        ask, (site, index) = TrainAsk.from_record(message.content), site_of(context)
        folder = state / site
        folder.mkdir(parents=True, exist_ok=True)
        if ask.home is not None:
            save_weights(folder / "0.safetensors", {"style": ask.home["style"]}, {})
        style = load_weights(folder / f"{ask.round - 1}.safetensors")[0]["style"]
        change = {
            name: torch.sin(weight * (index + 1) + style.sum() + ask.round) / 7
            for name, weight in ask.shared.items()
            if name != "constant"
        }
        pull = sum((value.sum() for value in ask.bank.values()), torch.zeros(()))
        after = style * 0.9 + sum((c.mean() for c in change.values()), torch.zeros(())) + pull
        save_weights(folder / f"{ask.round}.safetensors", {"style": after}, {})
        examples = 20 + 3 * index
        update = {name: torch.zeros_like(weight) for name, weight in ask.shared.items()} | change
        reply = TrainReply(
            plan_sha256=ask.plan_sha256,
            site=site,
            round=ask.round,
            examples=examples,
            update={name: delta * examples for name, delta in update.items()},
            metrics={"seconds": 0.5, "loss.total": 1.0 / (ask.round + index)},
            wire_dtype=ask.plan().release.wire_dtype,
        )
        return sent(message, site, "train", reply)

    @app.query("erasure")
    def erasure(message: Message, context: Context) -> Message:
        ask, (site, index) = ErasureAsk.from_record(message.content), site_of(context)
        sums = ask.shared["weight"].sum(0)[:2].double() * (index + 1)
        reply = ErasureReply(plan_sha256=ask.plan_sha256, site=site, moments={"sums": sums})
        return sent(message, site, "erasure", reply)

    return app


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> dict[str, Ring]:
    """Each site's vector of a secure sum before it was masked, of the last round; nobody but a test can see
    these."""
    vectors: dict[str, Ring] = {}
    mask = Party.mask

    def masked(self: Party, vector: Ring) -> None:
        vectors[self.site] = vector.copy()
        mask(self, vector)

    monkeypatch.setattr(Party, "mask", masked)
    return vectors


@dataclasses.dataclass(frozen=True)
class Miniature:
    """The pieces by name, for the tests."""

    plan: Callable[..., RunPlan] = a_plan
    model: Callable[[RunPlan], TinyModel] = TinyModel
    client: Callable[..., ClientApp] = tiny_client
    refusal: type[Refusal] = Refusal


@pytest.fixture(scope="session")
def miniature() -> Miniature:
    return Miniature()
