"""Replies to the four questions of a secure sum that were changed at random: put aside, or what a round can
go on with. Taken and judged as in `test_mutated_replies.py`; texts are changed inside as well."""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federation.exchanges.exchange import Exchange
from federation.exchanges.secure_sum import (
    SUM_KEYS,
    SUM_MASKED,
    SUM_SHARES,
    SUM_UNMASK,
    SumMaskedReply,
    SumTextReply,
    announced_of,
    announced_text,
    list_of,
    said_of,
    shares_of,
    texts_of,
)
from federation.plan.plan import RunPlan
from federation.wire.sum_layout import MASKED, SumLayout
from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import Opened, Party
from privacy.secure_sum.transcript import Attempt, SumRefused, SurvivorList, threshold
from server.exchanges.secure_sum import SumReport, _check_texts
from simulations.consortium import simulated_identity
from simulations.engines.in_process import InProcessGrid
from strategies.reply_wall import ReplyWall
from strategies.ring_sum import RingSum
from tests.rounds.secure_sums import SITES, a_plan, centre
from tests.rounds.test_mutated_replies import HONEST, SITE, Case, Settle, Unwritten, registered, send

LEAST = threshold(len(SITES))
EVERYBODY = SurvivorList(frozenset(SITES), frozenset())


@dataclasses.dataclass
class TextCase(Case):
    """A reply that is a text, of which a few characters may be others."""

    def answered(self, draws: random.Random) -> bool:
        """As `Case`."""
        head = self.valid["head"]
        text = str(head["text"])
        letters = list(text)
        for _ in range(draws.choice((0, 0, 1, 2))):
            place = draws.randrange(len(letters))
            letters[place : place + draws.randrange(2)] = draws.choice('01af"{}[]:,x-\n')
        head["text"] = "".join(letters) if draws.random() < 0.5 else text
        try:
            return super().answered(draws)
        finally:
            head["text"] = text


def masked_case(plan: RunPlan, folder: Path, layout: SumLayout) -> Case:
    """A masked vector."""
    strategy, draws = centre(plan, folder), np.random.default_rng(1)
    strategy.report = SumReport(1, attempt=1)
    honest, own = (torch.from_numpy(draws.integers(0, 2**32, layout.size, dtype=np.uint32)) for _ in range(2))
    valid = SumMaskedReply(plan_sha256=plan.sha256, site=SITE, round=1, attempt=1, masked={MASKED: own})

    def begin() -> tuple[ReplyWall[Any], Settle]:
        total = RingSum(layout)
        total.fold(HONEST, {MASKED: honest})

        def use(reply: SumMaskedReply) -> None:
            strategy._of_this_attempt(reply)
            total.fold(reply.site, reply.masked)

        wall = ReplyWall(
            "round 1", SUM_MASKED.route, plan.sha256, registered(plan.sites), Unwritten(),
            lambda came: SumMaskedReply.from_record(came, copy=False), use,
        )  # fmt: skip

        def settle(reply: Any) -> None:
            assert total._total is not None
            if reply is None:
                assert total.sites == [HONEST] and np.array_equal(total._total, honest.numpy())
                return
            assert total.sites == [HONEST, SITE] and (reply.round, reply.attempt) == (1, 1)
            assert np.array_equal(total._total, honest.numpy() + reply.masked[MASKED].numpy())

        return wall, settle

    shapes = {name: torch.zeros(shape) for name, shape in layout.shapes}
    question = strategy._asked(1, 1, {}, False)
    largest = SUM_MASKED.largest(plan, dataclasses.replace(question, shared=shapes))
    return Case(valid.to_record(), largest, begin)


def text_case(
    plan: RunPlan,
    folder: Path,
    exchange: Exchange[Any, SumTextReply],
    text: str,
    check: Callable[[SumTextReply], object],
    judge: Callable[[str], None],
) -> Case:
    """A reply to a stage that is a text; `judge` is called with each that was accepted."""
    strategy = centre(plan, folder)
    strategy.report = SumReport(1, attempt=1)
    valid = SumTextReply(plan_sha256=plan.sha256, site=SITE, round=1, attempt=1, text=text)

    def begin() -> tuple[ReplyWall[Any], Settle]:
        wall = ReplyWall(
            exchange.route, exchange.route, plan.sha256, registered(plan.sites), Unwritten(),
            SumTextReply.from_record, lambda reply: strategy._judge(reply, check),
        )  # fmt: skip
        return wall, lambda reply: None if reply is None else judge(reply.text)

    return TextCase(valid.to_record(), exchange.largest(plan, None), begin)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As in `test_mutated_replies.py`."""
    log = logging.getLogger("strategies.reply_wall")
    log.disabled = True
    yield
    log.disabled = False


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Valid replies to the four questions."""
    folder, plan = tmp_path_factory.mktemp("mutated"), a_plan()
    InProcessGrid(lambda message, context: message, 1)  # type: ignore[arg-type]  # whose messages they are
    attempt = Attempt(plan.sha256, 1, 1)
    parties = {site: Party.new(attempt, site) for site in SITES}
    roster = {site: party.announcement for site, party in parties.items()}
    divided = {site: party.divided(roster, LEAST) for site, party in parties.items()}
    joined = {
        site: party.joined({p: divided[p][1][site] for p in SITES if p != site}, LEAST)
        for site, (party, _) in divided.items()
    }
    layout = SumLayout.of(plan, {"weight": (3, 4), "constant": (2,)})
    plain = {site: np.full(50, number, dtype=np.uint32) for number, site in enumerate(SITES)}
    masked = {site: vector.copy() for site, vector in plain.items()}
    for site, party in joined.items():
        party.mask(masked[site])
    opened = {site: party.opened(EVERYBODY, LEAST) for site, party in joined.items()}

    def announcement(text: str) -> None:
        keys, _, signature = announced_of(text)
        assert len(keys.mask_key) == len(keys.share_key) == len(keys.seed_sha256) == 32
        assert isinstance(signature, bytes)

    def texts(text: str) -> None:
        """Whoever is given a text that was changed refuses it, and reads every other."""
        for site, came in shares_of(text).items():
            party = divided[site][0]
            held = {p: divided[p][1][site] for p in SITES if p not in (SITE, site)}
            try:
                party.joined({**held, SITE: came}, LEAST)
            except SumRefused:
                assert came != divided[SITE][1][site]

    def shares(text: str) -> None:
        """Three of four tell the truth, and the sum is right."""
        total = sum(masked.values(), np.zeros(50, dtype=np.uint32))
        answers = opened | {SITE: Opened.from_text(text, EVERYBODY)}
        unmask(total, attempt, roster, EVERYBODY, answers, LEAST)
        assert np.array_equal(total, sum(plain.values(), np.zeros(50, dtype=np.uint32)))

    said = announced_text(parties[SITE].announcement, attempt, plan, simulated_identity(SITE))
    listed = said_of(EVERYBODY.survivors, EVERYBODY.lost)
    return [
        text_case(plan, folder / "a", SUM_KEYS, said, lambda reply: announced_of(reply.text), announcement),
        text_case(
            plan,
            folder / "b",
            SUM_SHARES,
            texts_of(divided[SITE][1]),
            lambda reply: _check_texts(reply, set(SITES)),
            texts,
        ),
        masked_case(plan, folder / "c", layout),
        text_case(
            plan,
            folder / "d",
            SUM_UNMASK,
            opened[SITE].to_text(),
            lambda reply: Opened.from_text(reply.text, list_of(listed)),
            shares,
        ),
    ]


def test_of_1200_changed_replies_none_is_used_that_a_sum_cannot_go_on_with(cases: list[Case]) -> None:
    send(cases, range(1200))


@pytest.mark.slow
def test_nor_of_8000_more(cases: list[Case]) -> None:
    send(cases, range(1200, 9200))
