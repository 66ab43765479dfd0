"""An eighth exchange is what it says in three rooms and a row: here, how many scans the patients have.

The parts below stand for three files `visits.py`, in the exchanges of federation, client and server.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import exchanges, make_client_app
from client.exchanges.exchange import Answer, OnStep
from client.release import Gate, Released
from federation.exchanges.exchange import Exchange
from federation.journal import Journal
from federation.keys.identity import SiteIdentity
from federation.plan.plan import RunPlan
from federation.reply_book import ReplyBook
from federation.wire.limits import largest_reply
from federation.wire.messages import Ask, Reply, Tensors
from privacy.ledger import Ledger
from privacy.promise import Promise
from server.exchanges.queries import ask_sites
from simulations.consortium import simulated_identity
from simulations.engines.in_process import InProcessGrid
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster

# federation/exchanges/visits.py


@dataclass(frozen=True, kw_only=True)
class VisitsAsk(Ask, kind="visits_ask"):
    most: int


@dataclass(frozen=True, kw_only=True)
class VisitsReply(Reply, kind="visits_reply"):
    visits: Tensors


VISITS = Exchange(
    route="query.visits",
    ask=VisitsAsk,
    reply=VisitsReply,
    rounds=lambda plan: range(1),
    largest=lambda plan, ask: largest_reply({"visits": torch.zeros(1)}),
    promise=lambda plan, ask: Promise(
        kind="visits", bound=float(ask.most), unit="patient statistics", enforcement="check"
    ),
)

# client/exchanges/visits.py


def answer_visits(site: Any, ask: VisitsAsk, plan: RunPlan, gate: Gate, on_step: OnStep) -> Released:
    visits = Counter(site.scans(plan))
    total = torch.tensor([float(sum(min(count, ask.most) for count in visits.values()))])
    return gate.release({"visits": total}, {"visits": (1,)}, weight=float(len(visits)))


def visits_mail(released: Released, ask: VisitsAsk, site: str) -> VisitsReply:
    return VisitsReply(plan_sha256=ask.plan_sha256, site=site, visits=dict(released.tensors))


ANSWER = Answer(VISITS, answer_visits, visits_mail)

# server/exchanges/visits.py


def check_visits(reply: VisitsReply) -> None:
    if set(reply.visits) != {"visits"}:
        raise ReplyRefused("Expected a number of visits.")


@dataclass
class Hospital:
    name: str
    state_dir: Path
    patients: list[str]
    minimum_cohort: int = 0
    compile: bool = False
    launcher: None = None
    progress_every_s: float = 30.0
    exact_sums: bool = False
    secret: bytes = b"1" * 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.state_dir / "ledger.jsonl")
        self.journal = Journal(self.state_dir / "journal.jsonl")

    def identity(self) -> SiteIdentity:
        return simulated_identity(self.name)

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        """Every plan."""

    def scans(self, plan: RunPlan) -> list[str]:
        return self.patients


def test_an_eighth_exchange_is_three_files_and_a_row(miniature: Any, tmp_path: Path) -> None:
    plan = miniature.plan()
    sites = [
        Hospital(name, tmp_path / name, [f"p{n}" for n in range(5)] + ["p0"] * more)
        for more, name in enumerate(plan.sites)
    ]

    def open_site(context: Context) -> Any:
        return sites[int(context.node_config["partition-id"])]

    app = make_client_app(open_site, answers=[*exchanges(), ANSWER])
    grid = InProcessGrid(app, len(sites), through_wire=True)
    book = ReplyBook(Journal(tmp_path / "journal.jsonl"))
    ask = VisitsAsk(plan_json=plan.to_json(), most=2)
    replies, refused = ask_sites(grid, Roster(plan.participants), plan, VISITS, ask, check_visits, book)
    assert refused == {}
    assert [float(replies[name].visits["visits"]) for name in plan.sites] == [5.0, 6.0, 6.0]
    kinds = [entry.record["kind"] for entry in sites[0].journal.entries()]
    assert kinds == ["visits"]


def test_without_its_row_nobody_answers_it(miniature: Any, tmp_path: Path) -> None:
    app = make_client_app(lambda context: pytest.fail("opened"))
    assert VISITS.route not in [row.exchange.route for row in exchanges()]
    grid = InProcessGrid(app, 3)
    plan = miniature.plan()
    book = ReplyBook(Journal(tmp_path / "journal.jsonl"))
    ask = VisitsAsk(plan_json=plan.to_json(), most=2)
    with pytest.raises(ValueError, match="visits"):
        ask_sites(grid, Roster(plan.participants), plan, VISITS, ask, check_visits, book)
