"""A centre that wants to see one site's update in a secure sum fails, and succeeds without each defence."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from federation.exchanges.pretraining import PRETRAINING, TrainAsk
from federation.exchanges.secure_sum import (
    SUM_KEYS,
    SUM_MASKED,
    SUM_SHARES,
    SUM_UNMASK,
    SumKeysAsk,
    SumSharesAsk,
    SumTextReply,
    SumUnmaskAsk,
    announced_of,
    announced_text,
    roster_text,
    said_of,
)
from federation.journal import Journal
from federation.plan.plan import AggregationPlan, RunPlan
from federation.reply_book import ReplyBook
from meduet_models.weights import load_weights
from privacy.secure_sum.masks import add_mask, seed_key
from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import Party
from privacy.secure_sum.ring import Ring
from privacy.secure_sum.transcript import Attempt, SurvivorList, checked_roster, threshold
from server.exchanges.pretraining import pretraining
from server.exchanges.secure_sum import SecureSums
from server.model import MeduetModel
from simulations.consortium import simulated_identity
from simulations.engines.in_process import InProcessGrid
from strategies.content_share import ContentShare
from strategies.quorum import Roster, RoundFailed
from tests.rounds.secure_sums import (
    SITES,
    Sites,
    a_plan,
    answer,
    centre,
    go,
    moved_by,
)


def test_nothing_that_the_centre_received_shows_a_site(tmp_path: Path, plain: dict[str, Ring]) -> None:
    """The centre reads every byte that came, and takes off every mask that it was given."""
    plan = a_plan()
    sites = Sites(plan, tmp_path)
    strategy = go(plan, tmp_path, sites)
    came = b"".join(sites.sent)
    vectors, seeds = received(plan, strategy, tmp_path)
    for site, own in plain.items():
        attempt, seed = seeds[site]
        unmasked = vectors[site].copy()
        add_mask(unmasked, seed_key(seed, attempt, site), -1)  # survivors' own masks are the centre's to know
        for seen in (vectors[site], unmasked):
            off = (seen - own).view(np.uint8)  # what still hides it
            counts = np.bincount(off, minlength=256)
            expected = len(off) / 256
            assert float(((counts - expected) ** 2 / expected).sum()) < 400  # 255 degrees of freedom: 2e-8
        pieces = [own.tobytes()[i : i + 16] for i in range(0, own.nbytes - 16, 1024)]
        assert not any(piece in came for piece in pieces if piece != bytes(16))
    secrets = [p.read_text() for p in (tmp_path / "sites").rglob("*.sum")]
    for kept in secrets:  # the private half of a key never came
        party = Party.from_text(kept)
        assert not any(secret.hex().encode() in came for secret in (party.mask_secret, party.seed))
    # The sum itself is no secret: it is found where it should be.
    assert moved_by(plan, strategy, plain, list(SITES))


def test_without_a_secure_sum_the_same_search_finds_every_site(tmp_path: Path) -> None:
    plan = a_plan(secure_sum=False)
    sites = Sites(plan, tmp_path)
    shared, home = MeduetModel(plan).start()
    told = pretraining(plan, {}, home)
    book = ReplyBook(Journal(tmp_path / "journal.jsonl"))
    strategy = ContentShare(plan, shared, told, roster=Roster(SITES), folder=tmp_path, book=book)
    (_,) = strategy.rounds(InProcessGrid(sites, 4, through_wire=True))
    came = b"".join(sites.sent)
    for site in SITES:
        (path,) = (tmp_path / "sites" / site / "answers").rglob("round-*.safetensors")
        update = load_weights(path)[0]["embed.weight"]
        assert update.numpy().tobytes() in came


def received(
    plan: RunPlan, strategy: SecureSums, folder: Path
) -> tuple[dict[str, Ring], dict[str, tuple[Any, bytes]]]:
    """Masked vectors as the sites keep them, and each site's seed, which survivors open."""
    vectors, seeds = {}, {}
    for site in plan.sites:
        (path,) = (folder / "sites" / site / "answers").rglob("round-0001-attempt1.safetensors")
        vectors[site] = load_weights(path)[0]["masked"].numpy()
        (kept,) = (folder / "sites" / site).rglob("*.sum")
        assert kept.stat().st_mode & 0o777 == 0o600
        party = Party.from_text(kept.read_text())
        seeds[site] = (party.attempt, party.seed)
    return vectors, seeds


def test_a_site_opens_one_list_of_a_round_and_that_again(tmp_path: Path) -> None:
    plan, everybody = a_plan(), frozenset(SITES)
    sites = Sites(plan, tmp_path)
    go(plan, tmp_path, sites)

    def ask(survivors: frozenset[str], lost: frozenset[str]) -> Any:
        said = said_of(survivors, lost)
        question = SumUnmaskAsk(plan_json=plan.to_json(), round=1, attempt=1, said=said)
        return answer(sites, plan, "oslo", SUM_UNMASK.route, question)

    first, again = (SumTextReply.from_record(ask(everybody, frozenset()).content) for _ in range(2))
    assert first == again
    assert ask(everybody - {"porto"}, frozenset({"porto"})) == "answered_before"


@pytest.mark.slow
def test_a_site_that_begins_again_never_opens_the_attempt_it_gave_up(tmp_path: Path) -> None:
    plan = a_plan()
    lost = Sites(plan, tmp_path, lambda site, at, n: site in SITES[:2] and at == SUM_MASKED.route)
    with pytest.raises(RoundFailed):
        go(plan, tmp_path, lost)
    sites = Sites(plan, tmp_path)
    said = said_of(frozenset(SITES), frozenset())
    for attempt in (1, 2):
        question = SumUnmaskAsk(plan_json=plan.to_json(), round=1, attempt=attempt, said=said)
        assert answer(sites, plan, "turin", SUM_UNMASK.route, question) == "sum_refused"
    fresh = SumKeysAsk(plan_json=plan.to_json(), round=1, attempt=100)
    assert answer(sites, plan, "turin", SUM_KEYS.route, fresh) == "malformed"


def test_under_a_plan_with_secure_sums_nobody_can_ask_for_an_unmasked_round(tmp_path: Path) -> None:
    plan = a_plan()
    shared, home = MeduetModel(plan).start()
    question = TrainAsk(plan_json=plan.to_json(), round=1, shared=shared, bank={}, home=home)
    assert answer(Sites(plan, tmp_path), plan, "oslo", PRETRAINING.route, question) == "malformed"
    without = dataclasses.replace(plan, aggregation=AggregationPlan())
    assert len(PRETRAINING.rounds(without)) == 1 and not SUM_MASKED.rounds(without)


def test_a_centre_that_puts_its_own_keys_in_place_of_others_is_refused(tmp_path: Path) -> None:
    """Without signatures the centre is everybody else to a site, and reads its vector."""
    plan, victim = a_plan(), "oslo"
    sites, attempt, least = Sites(plan, tmp_path), Attempt(plan.sha256, 1, 1), threshold(4)
    said = {}
    for site in SITES:
        question = SumKeysAsk(plan_json=plan.to_json(), round=1, attempt=1)
        said[site] = SumTextReply.from_record(
            answer(sites, plan, site, SUM_KEYS.route, question).content
        ).text
    puppets = {site: Party.new(attempt, site) for site in SITES if site != victim}

    # The attack, against a site that checks no signatures.
    own = Party.new(attempt, victim)
    roster = {site: party.announcement for site, party in (puppets | {victim: own}).items()}
    checked_roster(roster, SITES, victim, own.announcement, least)
    divided = {site: party.divided(roster, least) for site, party in (puppets | {victim: own}).items()}
    together = {
        site: party.joined({p: divided[p][1][site] for p in SITES if p != site}, least)
        for site, (party, _) in divided.items()
    }
    secret = np.arange(50, dtype=np.uint32)
    seen = secret.copy()
    together[victim].mask(seen)
    total = seen.copy()
    for puppet in puppets:
        nothing = np.zeros_like(secret)
        together[puppet].mask(nothing)
        total += nothing
    everybody = SurvivorList(frozenset(SITES), frozenset())
    opened = {site: together[site].opened(everybody, least) for site in puppets}
    unmask(total, attempt, roster, everybody, opened, least)
    assert np.array_equal(total, secret)

    def ask(changed: dict[str, str]) -> Any:
        question = SumSharesAsk(plan_json=plan.to_json(), round=1, attempt=1, roster=roster_text(changed))
        return answer(sites, plan, victim, SUM_SHARES.route, question)

    # Signed by another site, by nobody, for another attempt: refused.
    keys = puppets["lyon"].announcement
    another = announced_text(keys, attempt, plan, simulated_identity("turin"))
    assert ask(said | {"lyon": another}) == "sum_refused"
    unsigned = announced_text(keys, attempt, plan, simulated_identity("lyon")).replace("30", "31", 3)
    assert ask(said | {"lyon": unsigned}) == "sum_refused"
    later = announced_text(keys, Attempt(plan.sha256, 1, 2), plan, simulated_identity("lyon"))
    assert ask(said | {"lyon": later}) == "sum_refused"
    assert announced_of(said["lyon"])[0] != keys
    assert isinstance(ask(said), Message)


def test_the_centre_puts_aside_keys_that_somebody_else_signed_and_sums_the_others(tmp_path: Path) -> None:
    """One site announces under another's signature. Without the check it costs everybody the attempt."""
    plan = a_plan()

    class Forging(Sites):
        def __call__(self, message: Message, context: Any) -> Message:
            reply = super().__call__(message, context)
            site = SITES[int(context.node_config["partition-id"])]
            if site == "porto" and message.metadata.message_type == SUM_KEYS.route:
                said = SumTextReply.from_record(reply.content)
                keys = announced_of(said.text)[0]
                attempt = Attempt(plan.sha256, said.round, said.attempt)
                forged = announced_text(keys, attempt, plan, simulated_identity("turin"))
                reply = Message(dataclasses.replace(said, text=forged).to_record(), reply_to=message)
            return reply

    checked = go(plan, tmp_path / "checked", Forging(plan, tmp_path / "checked"))
    assert set(checked.report.sites) == set(SITES) - {"porto"} and checked.report.attempt == 1
    assert "Expected keys that 'porto' signed." in checked.report.refused["porto"]
    unchecked = centre(plan, tmp_path / "unchecked")
    unchecked._authority = None
    with pytest.raises(RoundFailed, match="sum_refused"):
        go(plan, tmp_path / "unchecked", Forging(plan, tmp_path / "unchecked"), unchecked)


def test_metrics_and_counts_of_single_sites_are_nowhere_at_the_centre(tmp_path: Path) -> None:
    plan = a_plan()
    told: list[Mapping[str, Any]] = []
    strategy = centre(plan, tmp_path)
    strategy._on_reply = lambda round_number, site, report: told.append(report)
    go(plan, tmp_path, Sites(plan, tmp_path), strategy)
    for report in [*told, *strategy.report.sites.values()]:
        assert set(report) == {"bytes_down", "bytes_up", "loss"} and report["loss"] == {}
    assert strategy.report.loss["total"] > 0 and strategy.report.summed["examples"] == 38
    lines = [entry.record for entry in Journal(tmp_path / "journal.jsonl").entries()]
    (line,) = [one for one in lines if (one["to"], one["site"]) == (SUM_MASKED.route, "oslo")]
    assert "examples" not in line and line["norm"] == 0
    own = Journal(tmp_path / "sites" / "oslo" / "journal.jsonl").entries()
    (left,) = [one.record for one in own if one.record["kind"] == "round"]
    assert left["sha256"] == line["sha256"] and left["bytes"] == line["bytes"]
    assert left["masked"]["counts"] == {"examples": 8} and left["counts"] == left["metrics"] == {}
    assert left["norm_after"] <= left["bound"]
