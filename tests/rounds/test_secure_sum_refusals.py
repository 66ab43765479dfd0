"""What a secure sum does not go on with, each with its sentence: plans, keys and texts that are not right."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.commands.plan_words import plan_words
from client.exchanges.exchange import AskRefused
from client.settings import SiteConfig
from client.site import Site
from federation.exchanges.secure_sum import (
    SUM_KEYS,
    SUM_MASKED,
    SUM_SHARES,
    SUM_UNMASK,
    SumKeysAsk,
    SumMaskedAsk,
    SumSharesAsk,
    SumTextReply,
    SumUnmaskAsk,
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
from federation.plan.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan
from federation.published_plan import PublishedPlan
from forms.json_text import canonical
from privacy.secure_sum.party import Opened, Party
from privacy.secure_sum.transcript import Attempt, SumRefused, SurvivorList
from server.model import MeduetModel
from simulations.consortium import simulated_identity
from tests.rounds.secure_sums import (
    SITES,
    Sites,
    a_plan,
    answer,
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


def shared_by_all(plan: RunPlan, sites: Sites) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """What four sites said in the first two stages of an attempt: announcements, and texts by who wrote
    them."""
    first = {"plan_json": plan.to_json(), "round": 1, "attempt": 1}

    def said(site: str, route: str, question: Any) -> str:
        return SumTextReply.from_record(answer(sites, plan, site, route, question).content).text

    announced = {site: said(site, SUM_KEYS.route, SumKeysAsk(**first)) for site in SITES}
    question = SumSharesAsk(**first, roster=roster_text(announced))
    texts = {site: shares_of(said(site, SUM_SHARES.route, question)) for site in SITES}
    return announced, {site: {peer: text.hex() for peer, text in own.items()} for site, own in texts.items()}


def test_a_roster_that_changed_and_a_share_that_does_not_open_are_refused_in_one_sentence(
    tmp_path: Path,
) -> None:
    plan = a_plan()
    sites = Sites(plan, tmp_path)
    announced, texts = shared_by_all(plan, sites)
    shared, home = MeduetModel(plan).start()

    def ask_shares(roster: dict[str, str]) -> Any:
        question = SumSharesAsk(plan_json=plan.to_json(), round=1, attempt=1, roster=roster_text(roster))
        return answer(sites, plan, "oslo", SUM_SHARES.route, question)

    def ask_masked(changed: dict[str, str]) -> Any:
        question = SumMaskedAsk(
            plan_json=plan.to_json(), round=1, shared=shared, bank={}, home=home, attempt=1,
            texts=canonical(changed),
        )  # fmt: skip
        return answer(sites, plan, "oslo", SUM_MASKED.route, question)

    # A second roster, signed by everybody on it, for the attempt in which the first was answered.
    assert isinstance(ask_shares(announced), Message)
    assert ask_shares({site: announced[site] for site in SITES[:3]}) == "answered_before"

    mine = {peer: texts[peer]["oslo"] for peer in SITES[1:]}
    flipped = f"{int(mine['lyon'][-1], 16) ^ 1:x}"
    log = tmp_path / "sites" / "oslo" / "site.log"
    for changed, why in (
        (mine | {"lyon": mine["lyon"][:-1] + flipped}, "Expected shares that open; these do not."),
        (mine | {"lyon": texts["lyon"]["turin"]}, "Expected shares that open; these do not."),
        ({"lyon": mine["lyon"]}, "Expected shares of at least 3 sites, own ones included; got fewer."),
        (mine | {"rome": mine["lyon"]}, "Expected shares of others on the roster; got 'rome''s."),
    ):
        assert ask_masked(changed) == "sum_refused"
        assert log.read_text().rstrip().endswith(f"SumRefused: {why}")
    assert not list((tmp_path / "sites" / "oslo" / "state").glob("*"))  # refused before anything was trained
    assert isinstance(ask_masked(mine), Message)


def test_a_site_that_lost_its_secrets_masks_nothing_and_opens_nothing(tmp_path: Path) -> None:
    plan = a_plan()
    sites = Sites(plan, tmp_path)
    announced, _ = shared_by_all(plan, sites)
    (kept,) = (tmp_path / "sites" / "oslo").rglob("*.sum")
    log = tmp_path / "sites" / "oslo" / "site.log"
    for content in (None, "", "not JSON", kept.read_text()[:-9]):
        kept.unlink() if content is None else kept.write_text(content)
        said = said_of(frozenset(SITES), frozenset())
        question = SumUnmaskAsk(plan_json=plan.to_json(), round=1, attempt=1, said=said)
        assert answer(sites, plan, "oslo", SUM_UNMASK.route, question) == "sum_refused"
        assert "Expected the secrets of attempt 1 of round 1; there are none." in log.read_text()
    # What left before leaves again; fresh secrets under the same keys never do.
    again = SumKeysAsk(plan_json=plan.to_json(), round=1, attempt=1)
    reply = answer(sites, plan, "oslo", SUM_KEYS.route, again)
    assert SumTextReply.from_record(reply.content).text == announced["oslo"]


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
