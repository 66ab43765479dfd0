"""Latents through messages: the real client and its gate, the real bank, scans in memory."""

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

import federation.exchanges.latents
import simulations.engines.in_process
from client.app import make_client_app
from client.exchanges.exchange import AskRefused
from client.exchanges.latents import KEY_NAME, TABLE_NAME, consent
from client.latents.examples import examples_of
from federation.exchanges.latents import LatentsAsk, ToldLatents, latent_bound
from federation.journal import Journal
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import ReleasePlan, RunPlan, StylePlan
from federation.plan.release_policy import RAW
from federation.reply_book import ReplyBook
from federation.wire.sealing import recipient_key, recipient_of
from federation.wire.wire import RefusalKind
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from scans.volumes import Geometry
from server.exchanges.latents import check_reply, collect
from server.latent_bank.bank import LatentBank
from server.latent_bank.listing import items
from server.latent_bank.records import Codes
from simulations.engines.in_process import InProcessGrid, message_bytes
from strategies.aggregation import ReplyRefused
from strategies.quorum import Roster
from tests.worlds import RECIPIENT, Hospital, KnownScans, bank_key_in


class Scans(KnownScans):
    """Twelve scans of a site, ten of them for training, six with a label; counts how often they are read."""

    def __init__(self, site: int, loud: float = 1.0) -> None:
        super().__init__(site, 12, held_out=2, labelled=6)
        self.values *= loud
        self.patients = [f"secret-{site}-{n}" for n in range(12)]
        self.covariates = [{"sex": "FM"[n % 2], "body_part": "head"} for n in range(12)]
        self.reads = 0

    def latents(self, indices: Sequence[int], view: int = 0) -> torch.Tensor:
        assert view == 0 and not {10, 11} & set(indices)
        self.reads += 1
        return super().latents(indices)

    def geometry(self, row: int, view: int = 0) -> Geometry:
        return Geometry(np.diag([1.0, 1.5, 2.0 + row, 1.0]), (8, 8, 8), np.eye(4), (16, 24, 16))


@dataclasses.dataclass
class Consenting(Hospital):
    """A hospital with a site.yaml's sentence."""

    sentence: str = ""

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        consent(plan, self.sentence)


class Consortium:
    """Sites whose questions are counted."""

    def __init__(self, plan: RunPlan, folder: Path, silent: Sequence[str] = (), loud: float = 1.0) -> None:
        self.folder = folder
        self.scans = {site: Scans(number, loud) for number, site in enumerate(plan.sites)}
        self.asked: list[str] = []

        def open_site(context: Context) -> Consenting:
            name = plan.sites[int(context.node_config["partition-id"])]
            self.asked.append(name)
            own = folder / "sites" / name
            own.mkdir(parents=True, exist_ok=True)
            return Consenting(own, self.scans[name], name, sentence="" if name in silent else RAW.consent)

        self.grid = InProcessGrid(make_client_app(open_site), len(plan.sites), through_wire=True)
        self.roster = Roster(plan.sites)
        self.bank = LatentBank(folder / "bank", bank_key_in(folder / "bank.key"))
        self.book = ReplyBook(Journal(folder / "journal.jsonl"))

    def collect(self, plan: RunPlan, round_number: int, **more: Any) -> dict[str, Any]:
        return collect(self.grid, self.roster, plan, round_number, self.bank, self.book, **more)


@pytest.fixture
def make_plan(miniature: Any) -> Callable[..., RunPlan]:
    def plan(wire_dtype: Any = "float32", **changes: Any) -> RunPlan:
        settings: dict[str, Any] = {
            "policy": "raw",
            "recipient": RECIPIENT,
            "conditions": ("content", "category", "label_map", "body_part", "spacing"),
            "category": "sex",
            "categories": ("F", "M"),
            "labels": 2,
            **changes,
        }
        return dataclasses.replace(
            miniature.plan(deadline_s=60.0),
            release=ReleasePlan(wire_dtype=wire_dtype),
            style=StylePlan(minimum_cohort=5, body_parts=("head",)),
            diffusion=DiffusionPlan(
                transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
                training=DiffusionTraining(),
                **settings,
            ),
        )

    return plan


def books(consortium: Consortium, site: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    folder = consortium.folder / "sites" / site
    lines = [
        [json.loads(line)["record"] for line in (folder / name).read_text().splitlines()]
        for name in ("ledger.jsonl", "journal.jsonl")
    ]
    return lines[0], lines[1]


def table_of(consortium: Consortium, site: str) -> list[dict[str, str]]:
    """The site's own table of what left it."""
    text = (consortium.folder / "sites" / site / TABLE_NAME).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def test_the_latents_in_the_bank_are_the_sites_and_everything_is_in_the_books(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    consortium = Consortium(plan, tmp_path)
    report = consortium.collect(plan, 1, count=4)
    assert report["refused"] == {} and report["items"] == 30
    assert all(site["kept"] == 10 for site in report["sites"].values())
    source = consortium.bank.source(plan, 1)
    examples = source.read(torch.arange(30))
    names = [one["item"] for one in items(consortium.bank)]
    for number, site in enumerate(plan.sites):
        row_of = {line["item"]: int(line["patient"].split("-")[2]) for line in table_of(consortium, site)}
        rows = [row_of[name] for name in names[10 * number : 10 * number + 10]]
        assert sorted(rows) == list(range(10))
        truth = examples_of(consortium.scans[site], rows, plan)
        mine = examples.rows(torch.arange(10 * number, 10 * number + 10))
        for name in ("latents", "site", "body_part", "spacing", "category", "label_map"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(truth, name), rtol=0, atol=0, equal_nan=True
            )
        ledger, journal = books(consortium, site)
        assert [line["event"] for line in ledger] == ["reserve", "settle"] * 3
        assert "can be reconstructed" in ledger[0]["promise"] and ledger[0]["epsilon"] == "inf"
        assert [line["kind"] for line in journal] == ["latents"] * 3
        assert [len(line["items"]) for line in journal] == [4, 4, 2]
        promise = journal[0]["promise"]
        assert "patient data" in promise and "minimum cohort protects nobody" in promise
        assert journal[2]["counts"] == {"first_item": 8, "num_items": 10}
        assert "secret" not in json.dumps(journal) and "pacs" not in json.dumps(journal)


def test_a_site_that_has_not_agreed_releases_nothing_and_no_scan_is_read(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    consortium = Consortium(plan, tmp_path, silent=["lyon"])
    report = consortium.collect(plan, 1)
    assert list(report["sites"]) == ["oslo", "turin"] and len(consortium.bank) == 20
    assert "plan_not_accepted" in " ".join(report["refused"].values())
    assert consortium.scans["lyon"].reads == 0
    ledger, journal = books(consortium, "lyon")
    assert ledger == [] and {line["kind"] for line in journal} == {"refusal"}
    assert not (tmp_path / "sites" / "lyon" / KEY_NAME).exists()


@pytest.mark.parametrize("recipient", ["", "00" * 32, "01" + "00" * 31])
def test_a_plan_whose_bank_has_no_key_to_seal_to_is_refused_before_a_scan_is_read(
    make_plan: Callable[..., RunPlan], tmp_path: Path, recipient: str
) -> None:
    plan = make_plan(recipient=recipient)
    consortium = Consortium(plan, tmp_path)
    with pytest.raises(AskRefused, match=r"Expected diffusion\.recipient .*Nothing was read") as refused:
        consent(plan, RAW.consent)
    assert refused.value.kind is RefusalKind.PLAN_NOT_ACCEPTED and "\n" not in str(refused.value)
    report = consortium.collect(plan, 1)
    assert set(report["refused"].values()) == {"refused: plan_not_accepted"} and report["items"] == 0
    assert all(scans.reads == 0 for scans in consortium.scans.values())


def seen_between(consortium: Consortium, plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Every byte that lies between the sites and the bank, SuperLink's among them, in one collection."""
    seen: list[bytes] = []

    def read_on_the_way(message: Message) -> bytes:
        seen.append(message_bytes(message))
        return seen[-1]

    monkeypatch.setattr(simulations.engines.in_process, "message_bytes", read_on_the_way)
    consortium.collect(plan, 1, count=4)
    return b"".join(seen)


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sealed", [True, False])
def test_who_reads_everything_on_the_way_finds_no_latent(
    make_plan: Callable[..., RunPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wire_dtype: str,
    sealed: bool,
) -> None:
    plan = make_plan(wire_dtype)
    if not sealed:  # what this test looks for is found where nothing is sealed
        monkeypatch.setattr(federation.exchanges.latents, "seal", lambda clear, recipient, purpose: clear)
    consortium = Consortium(plan, tmp_path)
    seen = seen_between(consortium, plan, monkeypatch)
    found = 0
    for scans in consortium.scans.values():
        for latents in scans.values[:10]:
            narrow = latents.bfloat16().view(torch.int16) if wire_dtype == "bfloat16" else latents
            content = narrow.numpy().tobytes()
            assert len(content) > 128
            found += any(content[at : at + 64] in seen for at in range(0, len(content) - 64, 64))
    assert found == (0 if sealed else 12)  # all; or the first four of each, which the bank does not take
    assert len(consortium.bank) == (30 if sealed else 0)


def test_latents_sealed_to_another_bank_or_for_another_question_are_put_aside(
    make_plan: Callable[..., RunPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    own = federation.exchanges.latents.seal
    for name, instead in {
        "another bank": lambda clear, recipient, purpose: own(
            clear, recipient_of(recipient_key(bytes(32))), purpose
        ),
        "another question": lambda clear, recipient, purpose: own(clear, recipient, purpose + b" "),
        "no latents": lambda clear, recipient, purpose: own(b"{}", recipient, purpose),
    }.items():
        monkeypatch.setattr(federation.exchanges.latents, "seal", instead)
        consortium = Consortium(plan, tmp_path / name.replace(" ", "-"))
        report = consortium.collect(plan, 1, count=4)
        assert set(report["refused"]) == set(plan.sites) and report["items"] == 0, name


def test_asked_twice_a_site_says_the_same_and_the_bank_stays_as_it_is(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    consortium = Consortium(plan, tmp_path)
    consortium.collect(plan, 1)
    before = list(items(consortium.bank))
    asked = len(consortium.asked)
    again = consortium.collect(plan, 1)
    assert again["sites"] == {} and len(consortium.asked) == asked  # what is there is not asked for
    other = Consortium(plan, tmp_path / "elsewhere")  # the same hospitals, another bank
    for site in plan.sites:
        own = tmp_path / "elsewhere" / "sites" / site
        own.mkdir(parents=True)
        (own / KEY_NAME).write_bytes((tmp_path / "sites" / site / KEY_NAME).read_bytes())
    other.collect(plan, 1, count=3)
    assert [(i["item"], i["sha256"]) for i in items(other.bank)] == [(i["item"], i["sha256"]) for i in before]


def test_a_collection_that_is_cut_off_goes_on_where_the_bank_stands(
    make_plan: Callable[..., RunPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    consortium = Consortium(plan, tmp_path)
    add, added = LatentBank.add, []

    def dies(self: LatentBank, reply: ToldLatents, *more: Any) -> Any:
        if len(added) == 4:  # the second part of the second site
            raise KeyboardInterrupt
        added.append(reply.site)
        return add(self, reply, *more)

    with monkeypatch.context() as patched:
        patched.setattr(LatentBank, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            consortium.collect(plan, 1, count=4)
    assert len(consortium.bank) == 16
    consortium.asked.clear()
    report = consortium.collect(plan, 1, count=4)
    # lyon and turin tell their second part, then all their last one
    assert consortium.asked == ["lyon", "turin", "oslo", "lyon", "turin"]
    assert {site: counts["kept"] for site, counts in report["sites"].items()} == {
        "oslo": 2,
        "lyon": 6,
        "turin": 6,
    }
    whole = Consortium(plan, tmp_path / "whole")
    whole.collect(plan, 1)
    everything = torch.arange(30)
    ours, theirs = (one.bank.source(plan, 1).read(everything) for one in (consortium, whole))
    assert torch.equal(ours.latents, theirs.latents)


def test_rounds_release_part_by_part_up_to_the_quota(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan(items_per_round=3, items_per_site=7)
    consortium = Consortium(plan, tmp_path)
    kept = [consortium.collect(plan, round_number)["items"] for round_number in (1, 2, 3)]
    assert kept == [9, 18, 21]
    assert len(consortium.bank.source(plan, 2)) == 18
    journal = books(consortium, "oslo")[1]
    assert len({name for line in journal for name in line["items"]}) == 7


def test_a_scan_that_is_too_long_is_clipped_at_the_gate_and_the_journal_says_so(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan("bfloat16", latent_clip=2.0)
    consortium = Consortium(plan, tmp_path, loud=9.0)
    consortium.collect(plan, 1)
    examples = consortium.bank.source(plan, 1).read(torch.arange(30))
    lengths = examples.latents.flatten(1).norm(dim=1)
    assert bool((lengths <= latent_bound(plan)).all()) and bool((lengths > 0.98 * latent_bound(plan)).all())
    line = books(consortium, "oslo")[1][0]
    assert line["clipped"] and line["norm_after"] <= line["bound"] == latent_bound(plan) < line["norm_before"]


def test_an_item_that_a_patient_withdraws_leaves_the_bank_and_does_not_come_back(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan(items_per_round=5)
    consortium = Consortium(plan, tmp_path)
    consortium.collect(plan, 1)
    gone = table_of(consortium, "oslo")[0]["item"]
    consortium.bank.forget(item=gone)
    consortium.bank.forget(site="turin")
    consortium.asked.clear()
    report = consortium.collect(plan, 2)
    assert consortium.asked == ["oslo", "lyon"] and report["items"] == 4 + 5 + 5 + 5
    assert gone not in {one["item"] for one in items(consortium.bank)}
    assert not any(one["site"] == "turin" for one in items(consortium.bank))


def test_codes_made_at_the_centre_are_kept_with_the_latents(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    consortium = Consortium(plan, tmp_path)

    def encode(latents: torch.Tensor) -> Codes:
        return Codes(
            content=latents.mean((2, 3, 4)), style=latents.flatten(1)[:, :5], encoder_sha256="e" * 64
        )

    consortium.collect(plan, 1, encode=encode)
    source = consortium.bank.source(plan, 1)
    rows = torch.tensor([29, 3])
    content, style = source.codes(rows)
    assert torch.equal(content, encode(source.read(rows).latents).content) and style.shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: {"round": 2}, "items from 0 of round 1"),
        (lambda r: {"total": 11}, "at most 10"),
        (lambda r: {"total": 3}, "Expected 3 items; got 4"),
        (lambda r: {"items": r.items[:3], "examples": r.examples.rows(torch.arange(3))}, "Expected 4 items"),
        (lambda r: {"wire_dtype": "bfloat16"}, "values as float32"),
        (lambda r: {"wire_dtype": "mxint8"}, "values as float32"),
        (lambda r: examples(r, latents=r.examples.latents * 100), "at most"),
        (lambda r: examples(r, latents=r.examples.latents * torch.nan), "finite latents"),
        (lambda r: examples(r, latents=r.examples.latents[:, :1]), "Expected latents of"),
        (lambda r: examples(r, site=r.examples.site + 1), "items of oslo"),
        (lambda r: examples(r, category=r.examples.category + 2), "category from -1 to 1"),
        (lambda r: examples(r, body_part=r.examples.body_part - 2), "body_part from -1 to 0"),
        (lambda r: examples(r, spacing=-r.examples.spacing), "spacings above 0"),
        (lambda r: examples(r, label_map=r.examples.label_map * 0.5), "sum to one"),
        (lambda r: examples(r, label_map=None), "Expected latents of"),
    ],
)
def test_an_answer_that_is_not_one_is_put_aside(
    make_plan: Callable[..., RunPlan], tmp_path: Path, change: Any, why: str
) -> None:
    plan = make_plan(items_per_round=10)
    scans = Scans(0)
    ask = LatentsAsk(plan_json=plan.to_json(), round=1, first=0, count=4)
    reply = ToldLatents(
        plan_sha256=plan.sha256,
        site="oslo",
        round=1,
        first=0,
        total=10,
        items=tuple(f"{n:032x}" for n in range(4)),
        examples=examples_of(scans, [0, 1, 2, 3], plan),
    )
    bank = LatentBank(tmp_path / "bank")
    check_reply(reply, ask, plan, bank)
    with pytest.raises(ReplyRefused, match=why) as refused:
        check_reply(dataclasses.replace(reply, **change(reply)), ask, plan, bank)
    assert "\n" not in str(refused.value)
    bank.add(reply, plan)
    with pytest.raises(ReplyRefused, match="10 items of this round as before"):
        check_reply(dataclasses.replace(reply, total=9), ask, plan, bank)
    bank.close()


def test_a_site_that_claims_latents_without_end_is_not_asked_for_ever(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    ask = LatentsAsk(plan_json=plan.to_json(), round=1, first=0, count=2)
    reply = ToldLatents(
        plan_sha256=plan.sha256,
        site="oslo",
        round=1,
        first=0,
        total=1 << 20,
        items=tuple(f"{n:032x}" for n in range(2)),
        examples=examples_of(Scans(0), [0, 1], plan),
    )
    bank = LatentBank(tmp_path / "bank")
    check_reply(reply, ask, plan, bank)
    for claimed in ((1 << 20) + 1, 1 << 40, (1 << 63) - 1, -1):
        with pytest.raises(ReplyRefused, match="at most 1048576 items"):
            check_reply(dataclasses.replace(reply, total=claimed), ask, plan, bank)
    bank.close()


def test_a_collection_takes_no_longer_than_a_round_may(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    hurried = dataclasses.replace(plan, aggregation=dataclasses.replace(plan.aggregation, deadline_s=1e-3))
    consortium = Consortium(hurried, tmp_path)
    report = consortium.collect(hurried, 1, count=4)
    assert {site: counts["kept"] for site, counts in report["sites"].items()} == dict.fromkeys(plan.sites, 4)
    assert set(report["refused"]) == set(plan.sites)
    assert all("not all told within 0.001 s" in why for why in report["refused"].values())


def examples(reply: ToldLatents, **changes: Any) -> dict[str, Any]:
    return {"examples": dataclasses.replace(reply.examples, **changes)}


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        ({"round": 0}, "malformed"),
        ({"round": 9}, "malformed"),
        ({"count": 0}, "malformed"),
        ({"count": 10**9}, "malformed"),
        ({"first": -1}, "malformed"),
    ],
)
def test_a_question_for_what_is_not_released_is_refused_before_a_scan_is_read(
    make_plan: Callable[..., RunPlan], tmp_path: Path, ask: dict[str, int], word: str
) -> None:
    plan = make_plan()
    consortium = Consortium(plan, tmp_path)
    question = LatentsAsk(plan_json=plan.to_json(), **{"round": 1, "first": 0, "count": 4, **ask})
    (answer,) = consortium.grid.send_and_receive([Message(question.to_record(), 1000, "query.latents")])
    assert answer.content["head"]["reason"] == word
    assert consortium.scans["oslo"].reads == 0 and books(consortium, "oslo")[0] == []


def test_a_federated_plan_asks_for_no_consent_and_releases_no_latents(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan(policy="federated", rounds=2, recipient="")
    assert "no latents leave" in consent(plan, "")
    consortium = Consortium(plan, tmp_path, silent=plan.sites)
    with pytest.raises(ValueError, match="its policy is federated"):
        consortium.collect(plan, 1)


def test_the_names_of_items_depend_on_a_secret_of_the_site(
    make_plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    plan = make_plan()
    names = []
    for place in ("a", "b"):
        consortium = Consortium(plan, tmp_path / place)
        consortium.collect(plan, 1)
        names.append(list(items(consortium.bank)))
    assert not {one["item"] for one in names[0]} & {one["item"] for one in names[1]}
    assert [one["sha256"] for one in names[0]] == [one["sha256"] for one in names[1]]  # the order does not
