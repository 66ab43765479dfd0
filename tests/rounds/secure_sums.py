"""Secure sums in miniature: the real client and network, Flower's messages, hospitals that can be lost."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from client.app import make_client_app
from federation.exchanges.secure_sum import (
    SUM_KEYS,
    SUM_MASKED,
    SUM_SHARES,
    SUM_UNMASK,
)
from federation.journal import Journal
from federation.plan.plan import AggregationPlan, RunPlan, StylePlan, TrainingPlan
from federation.reply_book import ReplyBook
from federation.wire.messages import Refusal
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from privacy.secure_sum.ring import Ring
from server.exchanges.secure_sum import SecureSums
from server.model import MeduetModel
from simulations.consortium import simulated_identity
from simulations.engines.in_process import InProcessGrid, message_bytes, site_context
from strategies.quorum import Roster
from tests.worlds import Hospital, Latents, small_network, small_plan

SITES = ("oslo", "lyon", "turin", "porto")
ROUTES = (SUM_KEYS.route, SUM_SHARES.route, SUM_MASKED.route, SUM_UNMASK.route)
Lost = Callable[[str, str, int], bool]
"""Of a site, a route and the round's (or attempt's) number: whether it is lost there."""


class Killed(BaseException):
    """As if a process had ended: nothing catches it."""


def a_plan(sites: tuple[str, ...] = SITES, rounds: int = 1, **aggregation: Any) -> RunPlan:
    settings: dict[str, Any] = {"secure_sum": True, "quorum": 0.75, "norm_tolerance": 0.0, "deadline_s": 60.0}
    return small_plan(
        sites=sites,
        network=small_network(code_size=8),
        objective=ObjectiveConfig(weights=LossWeights(invariance=0.0, restyled_reconstruction=0.0)),
        training=TrainingPlan(rounds=rounds, steps_per_round=1, batch_size=4, warmup=0.0),
        style=StylePlan(minimum_cohort=5, exchange="none"),
        aggregation=AggregationPlan(**settings | aggregation),
    )


class Sites(ClientApp):
    """Hospitals, some of which are lost at some questions; keeps all that was sent."""

    def __init__(self, plan: RunPlan, folder: Path, lost: Lost = lambda site, route, number: False) -> None:
        super().__init__()
        self._plan, self._lost = plan, lost
        self.sent: list[bytes] = []
        self.counted = 0

        def open_site(context: Context) -> Hospital:
            index = int(context.node_config["partition-id"])
            name = plan.sites[index]
            return Hospital(folder / "sites" / name, Latents([index], 8 + index), name)

        self._inner = make_client_app(open_site)

    def __call__(self, message: Message, context: Context) -> Message:
        site = self._plan.sites[int(context.node_config["partition-id"])]
        head = message.content.config_records["head"]
        number = int(head.get("attempt", head["round"]))  # type: ignore[arg-type]
        if self._lost(site, message.metadata.message_type, number):
            return Message(Error(code=5, reason="gone"), reply_to=message)
        reply = self._inner(message, context)
        self.counted += 1
        self.sent.append(message_bytes(reply))
        return reply


def centre(plan: RunPlan, folder: Path) -> SecureSums:
    shared, home = MeduetModel(plan).start()
    book = ReplyBook(Journal(folder / "journal.jsonl"))
    authority = simulated_identity(plan.sites[0]).authority
    return SecureSums(
        plan, shared, {}, home, roster=Roster(plan.sites), folder=folder, book=book, authority=authority
    )


def go(plan: RunPlan, folder: Path, sites: ClientApp, strategy: SecureSums | None = None) -> SecureSums:
    strategy = strategy or centre(plan, folder)
    for _ in strategy.rounds(InProcessGrid(sites, len(plan.sites), through_wire=True)):
        pass
    return strategy


def start_of(plan: RunPlan) -> dict[str, Tensor]:
    return MeduetModel(plan).start()[0]


def moved_by(plan: RunPlan, strategy: SecureSums, plain: Mapping[str, Ring], who: list[str]) -> bool:
    """Whether the shared weights moved by the mean of exactly these sites' vectors."""
    total = np.zeros_like(plain[who[0]])
    for site in who:
        total += plain[site]
    mean = strategy._layout.decoded(total, len(who)).mean
    return all(torch.equal(strategy.shared[n], mean[n] + before) for n, before in start_of(plan).items())


def answer(sites: ClientApp, plan: RunPlan, site: str, route: str, ask: Any) -> Any:
    """What a site says to a question that any centre may put to it: a refusal's word, or the message."""
    index = plan.sites.index(site)
    InProcessGrid(sites, len(plan.sites))
    context = site_context(index, len(plan.sites))
    reply = sites(Message(ask.to_record(), 1000 + index, route), context)
    head = reply.content.config_records["head"]
    return Refusal.from_record(reply.content).kind if head["kind"] == "refusal" else reply
