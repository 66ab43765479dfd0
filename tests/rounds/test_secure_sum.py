"""Rounds as secure sums: the real client and network, Flower's messages, with losses, kills and attacks."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from client.answers import KeptAnswers
from client.app import make_client_app
from client.commands.plan_words import plan_words
from client.exchanges.exchange import AskRefused
from client.exchanges.secure_sum import PartyMasking
from client.settings import SiteConfig
from client.site import Site
from client.sum_secrets import SumSecrets
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
    list_of,
    roster_of,
    roster_text,
    said_of,
    shares_of,
    texts_of,
)
from federation.journal import Journal
from federation.keys.certificates import CertificateRefused, utc_now
from federation.keys.identity import Peers
from federation.messages import Refusal
from federation.plan import AggregationPlan, ReleasePlan, RunPlan, StylePlan, TrainingPlan
from federation.published_plan import PublishedPlan
from federation.reply_book import ReplyBook
from meduet_models.objective.settings import LossWeights, ObjectiveConfig
from meduet_models.weights import load_weights
from privacy.ledger import Ledger
from privacy.secure_sum.masks import add_mask, seed_key
from privacy.secure_sum.opening import unmask
from privacy.secure_sum.party import Opened, Party
from privacy.secure_sum.ring import Ring
from privacy.secure_sum.transcript import Attempt, SumRefused, SurvivorList, checked_roster, threshold
from server.exchanges.pretraining import pretraining
from server.exchanges.secure_sum import SecureSums
from server.model import MeduetModel
from server.sum_records import SumRecords
from simulations.consortium import simulated_identity
from simulations.engines.in_process import InProcessGrid, message_bytes, site_context
from strategies.content_share import ContentShare
from strategies.quorum import Roster, RoundFailed
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
    return SecureSums(plan, shared, {}, home, roster=Roster(plan.sites), folder=folder, book=book)


def go(plan: RunPlan, folder: Path, sites: ClientApp, strategy: SecureSums | None = None) -> SecureSums:
    strategy = strategy or centre(plan, folder)
    for _ in strategy.rounds(InProcessGrid(sites, len(plan.sites), through_wire=True)):
        pass
    return strategy


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> dict[str, Ring]:
    """Each site's vector before it was masked, of the last round; nobody but a test can see these."""
    vectors: dict[str, Ring] = {}
    made = PartyMasking.masked

    def masked(self: PartyMasking, update: Any, weight: float, metrics: Any) -> dict[str, Tensor]:
        vectors[self.party.site] = self.layout.encoded(update, int(weight), metrics)
        return made(self, update, weight, metrics)

    monkeypatch.setattr(PartyMasking, "masked", masked)
    return vectors


def start_of(plan: RunPlan) -> dict[str, Tensor]:
    return MeduetModel(plan).start()[0]


def moved_by(plan: RunPlan, strategy: SecureSums, plain: Mapping[str, Ring], who: list[str]) -> bool:
    """Whether the shared weights moved by the mean of exactly these sites' vectors."""
    total = np.zeros_like(plain[who[0]])
    for site in who:
        total += plain[site]
    mean = strategy._layout.decoded(total, len(who)).mean
    return all(torch.equal(strategy.shared[n], mean[n] + before) for n, before in start_of(plan).items())


@pytest.mark.parametrize("route", ["", *ROUTES])
def test_a_site_that_is_lost_anywhere_leaves_the_sum_of_the_survivors(
    tmp_path: Path, plain: dict[str, Ring], route: str
) -> None:
    plan = a_plan()
    strategy = go(plan, tmp_path, Sites(plan, tmp_path, lambda site, at, _: (site, at) == ("turin", route)))
    rest = [site for site in SITES if site != "turin" or route in ("", SUM_UNMASK.route)]
    assert list(strategy.report.sites) and set(strategy.report.sites) == set(rest)
    assert moved_by(plan, strategy, plain, rest)
    assert not strategy.report.burnt and strategy.report.attempt == 1
    assert strategy.report.summed["examples"] == sum(8 + SITES.index(site) for site in rest)
    assert ("turin" in strategy.report.refused) == bool(route)


def test_the_mean_is_that_of_plain_rounds_to_the_grid(tmp_path: Path) -> None:
    plan = a_plan()
    secure = go(plan, tmp_path / "secure", Sites(plan, tmp_path / "secure"))
    open_plan = a_plan(secure_sum=False)
    shared, home = MeduetModel(open_plan).start()
    strategy = ContentShare(
        open_plan,
        shared,
        pretraining(open_plan, {}, home),
        roster=Roster(SITES),
        folder=tmp_path,
        book=ReplyBook(Journal(tmp_path / "journal.jsonl")),
    )
    sites = Sites(open_plan, tmp_path / "open")
    (report,) = strategy.rounds(InProcessGrid(sites, 4, through_wire=True))
    step = 2.0**-secure._layout.bits / sum(site["examples"] for site in report.sites.values())
    for name, weights in strategy.shared.items():
        assert float((secure.shared[name] - weights).abs().max()) <= 4 * 0.5 * step + 1e-7
    assert any(not torch.equal(strategy.shared[n], w) for n, w in shared.items())
    assert secure.report.loss["total"] == pytest.approx(report.loss["total"], abs=1e-2)


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


def test_too_few_at_the_end_burn_the_round_and_the_next_begins_from_the_same_weights(
    tmp_path: Path, plain: dict[str, Ring]
) -> None:
    plan = a_plan(rounds=2)
    strategy = centre(plan, tmp_path)
    gone = [True]
    lost = Sites(plan, tmp_path, lambda s, at, _: gone[0] and s in SITES[:2] and at == SUM_UNMASK.route)
    rounds = strategy.rounds(InProcessGrid(lost, 4, through_wire=True))
    first = next(rounds)
    assert "3 of 4 sites" in first.burnt and not first.loss and not first.summed
    assert all(torch.equal(strategy.shared[n], w) for n, w in start_of(plan).items())
    gone[0] = False
    assert not next(rounds).burnt
    assert moved_by(plan, strategy, plain, list(SITES))


@pytest.mark.slow
def test_rounds_that_are_burnt_one_after_the_other_stop_the_run(tmp_path: Path) -> None:
    plan = a_plan(rounds=5)
    lost = Sites(plan, tmp_path, lambda site, at, _: site in SITES[:2] and at == SUM_UNMASK.route)
    with pytest.raises(RoundFailed, match="3 in a row were burnt"):
        go(plan, tmp_path, lost)


@pytest.mark.parametrize("route", ROUTES[1:3])
def test_an_attempt_that_too_few_are_left_in_is_given_up_for_one_with_fresh_keys(
    tmp_path: Path, plain: dict[str, Ring], route: str
) -> None:
    plan = a_plan()
    lost = Sites(plan, tmp_path, lambda site, at, n: site in SITES[:2] and at == route and n == 1)
    strategy = go(plan, tmp_path, lost)
    assert strategy.report.attempt == 2 and moved_by(plan, strategy, plain, list(SITES))


def test_with_three_sites_a_loss_before_the_vectors_stops_every_attempt(tmp_path: Path) -> None:
    plan = a_plan(SITES[:3], quorum=1.0)
    lost = Sites(plan, tmp_path, lambda site, at, _: site == "turin" and at == SUM_MASKED.route)
    with pytest.raises(RoundFailed, match="3 of 3 sites"):
        go(plan, tmp_path, lost)
    again = go(plan, tmp_path, Sites(plan, tmp_path))
    assert again.report.attempt == 4 and not again.report.burnt


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    plan, folder = a_plan(SITES[:3], rounds=2, quorum=1.0), tmp_path_factory.mktemp("undisturbed")
    return go(plan, folder, Sites(plan, folder)).shared


@pytest.mark.parametrize("at", [1, 3, 4, 6, 7, 9, 10, 12])
def test_a_run_killed_at_any_reply_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Tensor], at: int
) -> None:
    plan = a_plan(SITES[:3], rounds=2, quorum=1.0)
    sites = Sites(plan, tmp_path)
    inner = sites._inner

    def dies(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if sites.counted + 1 == at:
            raise Killed
        return reply

    sites._inner = dies  # type: ignore[assignment]
    with pytest.raises(Killed):
        go(plan, tmp_path, sites)
    resumed = go(plan, tmp_path, Sites(plan, tmp_path))
    assert all(torch.equal(resumed.shared[name], undisturbed[name]) for name in undisturbed)
    assert resumed.report.attempt == 1


WRITES = [
    (SumSecrets, "keep", (1, 5, 8)),
    (KeptAnswers, "write", (2, 5, 8, 11)),
    (Ledger, "settle", (8, 11)),
    (SumRecords, "write", (1, 2, 3)),
]


@pytest.fixture(scope="module")
def undisturbed_round(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    plan, folder = a_plan(SITES[:3], quorum=1.0), tmp_path_factory.mktemp("undisturbed")
    return go(plan, folder, Sites(plan, folder)).shared


@pytest.mark.parametrize(
    ("kind", "name", "number"), [(kind, name, n) for kind, name, numbers in WRITES for n in numbers]
)
def test_a_round_killed_after_any_write_ends_in_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_round: dict[str, Tensor],
    kind: type,
    name: str,
    number: int,
) -> None:
    plan = a_plan(SITES[:3], quorum=1.0)
    write, counted = getattr(kind, name), [0]

    def dies(self: Any, *given: Any, **named: Any) -> Any:
        done = write(self, *given, **named)
        counted[0] += 1
        if counted[0] == number:
            raise Killed
        return done

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, dies)
        with pytest.raises(Killed):
            go(plan, tmp_path, Sites(plan, tmp_path))
    resumed = go(plan, tmp_path, Sites(plan, tmp_path)).shared
    assert all(torch.equal(resumed[name], undisturbed_round[name]) for name in undisturbed_round)


def answer(sites: ClientApp, plan: RunPlan, site: str, route: str, ask: Any) -> Any:
    """What a site says to a question that any centre may put to it: a refusal's word, or the message."""
    index = plan.sites.index(site)
    InProcessGrid(sites, len(plan.sites))
    context = site_context(index, len(plan.sites))
    reply = sites(Message(ask.to_record(), 1000 + index, route), context)
    head = reply.content.config_records["head"]
    return Refusal.from_record(reply.content).kind if head["kind"] == "refusal" else reply


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
