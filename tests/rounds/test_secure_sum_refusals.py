"""What a secure sum does not go on with, each with its sentence: plans, keys and texts that are not right."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.commands.plan_words import plan_words
from client.exchanges.exchange import AskRefused
from client.settings import SiteConfig
from client.site import Site
from federation.exchanges.secure_sum import (
    announced_of,
    announced_text,
    list_of,
    roster_of,
    roster_text,
    said_of,
    shares_of,
    texts_of,
)
from federation.keys.certificates import CertificateRefused, utc_now
from federation.keys.identity import Peers
from federation.plan import AggregationPlan, ReleasePlan, StylePlan
from federation.published_plan import PublishedPlan
from privacy.secure_sum.party import Opened, Party
from privacy.secure_sum.transcript import Attempt, SumRefused, SurvivorList
from simulations.consortium import simulated_identity
from tests.rounds.secure_sums import (
    SITES,
    a_plan,
)


def test_a_site_without_its_keys_says_so_and_one_whose_key_changed_is_not_believed(tmp_path: Path) -> None:
    config = SiteConfig(name="oslo", data_root=tmp_path / "scans", state_dir=tmp_path / "state")
    with pytest.raises(AskRefused, match="keys_dir") as refused:
        Site(config).identity()
    assert refused.value.kind == "no_keys"
    peers = Peers(tmp_path / "peers.json")
    peers.met({"oslo": "AAAA", "lyon": "BBBB"})
    peers.met({"lyon": "BBBB", "turin": "CCCC"})
    with pytest.raises(CertificateRefused, match="over the telephone"):
        peers.met({"oslo": "AAAA", "lyon": "DDDD"})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rule": "median"}, "compares the updates of single sites"),
        ({"norm_tolerance": 5.0}, "set aggregation.norm_tolerance=0"),
        ({"quorum": 0.5}, "needs 3 of them"),
        ({"method": "fedavg", "secure_sum": False, "weight_cap": 5}, "weight_cap has no effect"),
        ({"weight_cap": 1 << 20, "update_clip_norm": 10_000.0}, "half of the ring"),
        ({"sites": ("oslo", "lyon")}, "3 to 32 sites"),
        ({"sites": tuple(f"site{n}" for n in range(33))}, "3 to 32 sites"),
    ],
)
def test_a_plan_says_what_a_secure_sum_rules_out(changes: dict[str, Any], why: str) -> None:
    sites = changes.pop("sites", SITES)
    clip = changes.pop("update_clip_norm", 20.0)
    plan = a_plan()
    network = dataclasses.replace(plan.network, code_size=48)
    if changes.get("method") == "fedavg":
        style = StylePlan(minimum_cohort=5, exchange="none", head="shared", anchor=0.0)
        plan = dataclasses.replace(plan, style=style, aggregation=AggregationPlan(method="fedavg"))
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(
            plan,
            sites=sites,
            network=network,
            release=ReleasePlan(update_clip_norm=clip),
            aggregation=dataclasses.replace(plan.aggregation, **changes),
        )


@pytest.mark.parametrize("number", [3, 4])
def test_plan_show_says_what_a_secure_sum_means(number: int) -> None:
    plan = a_plan(SITES[:number], quorum=1.0)
    text = " ".join(words for _, words in plan_words(PublishedPlan(plan=plan, bundle_sha256="0" * 64)))
    assert f"3 of {number} sites must answer" in text and "MASKED" in text
    assert ("two that collude know yours" in text) == (number == 3)
    assert ("the loss of any one stops the sum" in text) == (number == 3)
    assert "one that lies can spoil the model" in text
    assert "rounds of training as secure sums: 1" in text


def mutated(text: str, draws: np.random.Generator) -> str:
    """A text in which a few characters are others, missing or doubled."""
    letters = list(text)
    for _ in range(int(draws.integers(1, 4))):
        place = int(draws.integers(len(letters)))
        letters[place : place + int(draws.integers(0, 2))] = draws.choice(list('01af"{}[]:,x-'), 1).tolist()
    return "".join(letters)


def test_texts_that_nobody_foresaw_are_refused_or_read_and_raise_nothing_else() -> None:
    plan, attempt = a_plan(), Attempt("a" * 64, 1, 1)
    identity = simulated_identity("oslo")
    parties = {site: Party.new(attempt, site) for site in SITES}
    roster = {site: party.announcement for site, party in parties.items()}
    divided = {site: party.divided(roster, 3) for site, party in parties.items()}
    texts = {peer: divided[peer][1]["oslo"] for peer in SITES if peer != "oslo"}
    party = divided["oslo"][0].joined(texts, 3)
    everybody = SurvivorList(frozenset(SITES), frozenset())
    announced = announced_text(party.announcement, attempt, plan, identity)
    readers: list[tuple[str, Callable[[str], object]]] = [
        (announced, announced_of),
        (
            roster_text({"oslo": announced}),
            lambda text: roster_of(text, attempt, plan, identity, utc_now()),
        ),
        (texts_of(texts), shares_of),
        (said_of(everybody.survivors, everybody.lost), list_of),
        (party.opened(everybody, 3).to_text(), lambda text: Opened.from_text(text, everybody)),
        (party.to_text(), Party.from_text),
    ]
    draws, refused = np.random.default_rng(0), 0
    for text, read in readers:
        read(text)
        for _ in range(150):
            try:
                read(mutated(text, draws))
            except SumRefused:
                refused += 1
    assert refused > 300
