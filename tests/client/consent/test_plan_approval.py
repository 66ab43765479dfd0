"""A site takes part in what its people approved, in the code they approved, at the hours they allow."""

import dataclasses
import io
import json
from collections.abc import Callable
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, Metadata, RecordDict
from rich.console import Console

import client.cli
import client.site
import server.cli
from client.app import make_client_app
from client.commands.plan_words import plan_settings, plan_words
from client.consent.approvals import AllowedHours, Approvals
from client.exchanges.exchange import AskRefused
from client.settings import SiteConfig
from client.site import Site
from federation.bundle import bundle_hash, running_bundle
from federation.exchanges.finetuning import FinetunePlan, LocalFinetuning
from federation.exchanges.survey import SURVEY, SurveyAsk
from federation.plan.diffusion_plan import DiffusionPlan
from federation.plan.plan import ProbePlan, RunPlan
from federation.published_plan import PublishedPlan
from federation.wire.messages import Refusal
from federation.wire.wire import RefusalKind
from meduet_models.diffusion.settings import DiffusionTraining, TransformerShape
from privacy.chain import BrokenChain
from server.consortium.plans import plan_to_run, publish


class Codec:
    """Stands in for a tokenizer whose hash is the toy plan's."""

    sha256 = "0" * 64


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return SiteConfig(
        name="south", data_root=tmp_path / "absent", state_dir=tmp_path / "state", device="cpu",
        allow_non_private=True,
    )  # fmt: skip


@pytest.fixture
def plan(toy_plan: Callable[..., RunPlan]) -> RunPlan:
    return toy_plan(probes=ProbePlan(every_rounds=2))


def site_of(config: SiteConfig) -> Site:
    site = Site(config)
    site.__dict__["tokenizer"] = Codec()
    return site


def published(plan: RunPlan, **changes: Any) -> PublishedPlan:
    return PublishedPlan(**{"plan": plan, "bundle_sha256": running_bundle()} | changes)


def refusal(site: Site, plan: RunPlan, finetuning: str = "") -> RefusalKind | None:
    try:
        site.accept(plan, finetuning)
    except AskRefused as error:
        return error.kind
    return None


def test_a_site_takes_part_only_in_a_plan_it_approved_and_until_it_withdraws(
    config: SiteConfig, plan: RunPlan
) -> None:
    site, book = site_of(config), Approvals(config.state_dir)
    assert refusal(site, plan) is RefusalKind.PLAN_NOT_ACCEPTED
    book.approve(published(plan))
    assert refusal(site, plan) is None
    assert refusal(site, dataclasses.replace(plan, seed=8)) is RefusalKind.PLAN_NOT_ACCEPTED
    assert refusal(site, dataclasses.replace(plan, sites=("north", "west"))) is RefusalKind.PLAN_NOT_ACCEPTED
    book.withdraw(published(plan))
    assert refusal(site, plan) is RefusalKind.PLAN_NOT_ACCEPTED
    assert refusal(site_of(dataclasses.replace(config, plan_approval="implied")), plan) is None


def test_an_approval_is_of_the_code_too(
    config: SiteConfig, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    Approvals(config.state_dir).approve(published(plan))
    monkeypatch.setattr(client.site, "running_bundle", lambda: "f" * 64)
    site = site_of(config)
    with pytest.raises(AskRefused, match="the code that runs is ffffffffffff") as error:
        site.accept(plan)
    assert error.value.kind is RefusalKind.PLAN_NOT_ACCEPTED


def test_the_approval_of_a_run_is_none_of_a_fine_tuning(config: SiteConfig, plan: RunPlan) -> None:
    local = LocalFinetuning(task="segmentation", classes=2)
    finetuning = FinetunePlan(run_sha256=plan.sha256, pretrained_sha256="1" * 64, local=local)
    site, book = site_of(config), Approvals(config.state_dir)
    book.approve(published(plan))
    assert refusal(site, plan, finetuning.sha256) is RefusalKind.PLAN_NOT_ACCEPTED
    book.approve(published(plan, finetuning=finetuning))
    assert refusal(site, plan, finetuning.sha256) is None
    text = " ".join(sentence for _, sentence in plan_words(published(plan, finetuning=finetuning)))
    assert "with your labels" in text and finetuning.sha256 in text
    with pytest.raises(ValueError, match="another's"):
        published(dataclasses.replace(plan, seed=8), finetuning=finetuning)


def test_an_edited_book_approves_nothing(config: SiteConfig, plan: RunPlan) -> None:
    site, other = site_of(config), dataclasses.replace(plan, seed=8)
    Approvals(config.state_dir).approve(published(plan))
    path = config.state_dir / "approvals.jsonl"
    path.write_text(path.read_text().replace(plan.sha256, other.sha256))
    with pytest.raises(BrokenChain, match="line 1"):
        site.accept(other)


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("18:00-06:00", ["18:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "17:59"]),
        ("09:30-17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
    ],
)
def test_hours_hold_their_first_minute_and_not_their_last(
    hours: str, inside: list[str], outside: list[str]
) -> None:
    allowed = AllowedHours.parse(hours)
    assert all(allowed.contain(time.fromisoformat(text)) for text in inside)
    assert not any(allowed.contain(time.fromisoformat(text)) for text in outside)


@pytest.mark.parametrize("text", ["18-06", "18:00", "25:00-06:00", "18:00-18:00", "night", "18:00-06:00 "])
def test_hours_that_cannot_be_meant_are_refused(config: SiteConfig, text: str) -> None:
    with pytest.raises(ValueError, match="Expected allowed_hours"):
        dataclasses.replace(config, allowed_hours=text)


def test_outside_its_hours_a_site_refuses_in_one_word_and_reads_nothing(
    config: SiteConfig, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Noon":
            return cls(2026, 3, 1, 12)

    monkeypatch.setattr(client.site, "datetime", Noon)
    Approvals(config.state_dir).approve(published(plan))
    site = site_of(dataclasses.replace(config, allowed_hours="18:00-06:00"))
    app = make_client_app(lambda context: site)
    metadata = Metadata(1, "id", 1, 2, "", "", 1e9, 60.0, SURVEY.route)
    message = Message(content=SurveyAsk(plan_json=plan.to_json()).to_record(), metadata=metadata)
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    reply = Refusal.from_record(app(message, context).content)
    assert (reply.kind, reply.site) == (RefusalKind.OUTSIDE_HOURS, "south")
    assert site.ledger.verify() == 0  # data_root is not even there
    (line,) = (entry.record for entry in site.journal.entries())
    assert (line["kind"], line["told"], line["of"]) == ("refusal", "outside_hours", "survey")


def test_a_published_plan_comes_back_and_an_edit_of_it_shows(plan: RunPlan) -> None:
    text = published(plan).to_json()
    assert PublishedPlan.from_json(text) == published(plan)
    with pytest.raises(ValueError, match="It was edited"):
        PublishedPlan.from_json(text.replace('"seed": 7', '"seed": 8'))
    with pytest.raises(ValueError, match="64 hex digits"):
        PublishedPlan.from_json(text.replace(running_bundle(), "short"))
    with pytest.raises(ValueError, match="published plan"):
        PublishedPlan.from_json(plan.to_json())


def test_the_words_say_every_bound_and_the_list_every_setting(plan: RunPlan) -> None:
    text = " ".join(sentence for _, sentence in plan_words(published(plan), site_minimum=17))
    for said in (plan.sha256, running_bundle(), "never of fewer than 17", "a length of 20", "modality mr"):
        assert said in text, said
    for said in ("at most 10 long", "3 rounds of 2 steps", "not differentially private", "Every 2 rounds"):
        assert said in text, said
    assert "LATENTS" not in text
    listed = list(plan_settings(published(plan)))
    assert "plan.training.learning_rate = 0.002" in listed
    assert len(listed) == sum(1 for _ in _leaves(dataclasses.asdict(plan)))


def test_raw_latents_are_said_to_leave_and_what_a_latent_is(plan: RunPlan) -> None:
    diffusion = DiffusionPlan(
        policy="raw",
        transformer=TransformerShape(patch_size=2, width=12, depth=1, heads=2),
        training=DiffusionTraining(),
        items_per_site=5,
    )
    words = plan_words(published(dataclasses.replace(plan, diffusion=diffusion)))
    text = " ".join(sentence for _, sentence in words)
    assert "LATENTS OF at most 5 of your training scans" in text and "can see the scan" in text
    assert "no scan, no file name" not in text


def test_a_plan_is_submitted_shown_approved_and_withdrawn_by_typing(
    config: SiteConfig, plan: RunPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    settings = tmp_path / "site.yaml"
    settings.write_text("name: south\ndata_root: absent\nstate_dir: state\nallow_non_private: true\n")

    def site(*typed: str) -> tuple[int, str]:
        screen = io.StringIO()
        status = client.cli.main([*typed, "--config", str(settings)], Console(file=screen, width=300))
        return status, screen.getvalue()

    assert server.cli.main(["publish", str(tmp_path / "plan.json"), "--out", str(tmp_path / "plans")]) == 0
    assert running_bundle() in capsys.readouterr().out
    (path,) = (tmp_path / "plans").iterdir()
    assert path.name == f"{plan.sha256}.plan.json" and plan_to_run(path) == plan
    short = plan.sha256[:12]
    status, said = site("plan", "approve", short)
    assert status == 2 and "plan show FILE" in said
    status, said = site("plan", "show", str(path), "--settings")
    assert status == 0 and "the same code" in said and "Not approved here" in said and "plan.seed = 7" in said
    assert site("plan", "withdraw", short)[0] == 2
    assert site("plan", "approve", short)[0] == 0
    assert refusal(site_of(config), plan) is None
    assert "Approved here." in site("plan", "show", short)[1]
    assert f"{short}  approved" in site("plan", "list")[1]
    assert site("plan", "withdraw", short)[0] == 0
    assert refusal(site_of(config), plan) is RefusalKind.PLAN_NOT_ACCEPTED
    assert "not approved" in site("plan", "list")[1]


def test_what_nobody_here_can_have_read_is_neither_approved_nor_run(
    config: SiteConfig, plan: RunPlan, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    path, _ = publish(tmp_path / "plan.json", tmp_path)
    values = json.loads(path.read_text()) | {"bundle_sha256": "e" * 64}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="published with eeeeeeeeeeee"):
        plan_to_run(path)
    settings = tmp_path / "site.yaml"
    settings.write_text("name: south\ndata_root: absent\nstate_dir: state\n")
    for typed, status in ((["show", str(path)], 0), (["approve", plan.sha256], 2)):
        screen = io.StringIO()
        typed = ["plan", *typed, "--config", str(settings)]
        assert client.cli.main(typed, Console(file=screen, width=300)) == status
        assert "eeeeeeeeeeee" in screen.getvalue()


def test_the_hash_of_the_code_changes_with_any_shipped_file_and_with_no_other(tmp_path: Path) -> None:
    for name in (
        "client/app.py",
        "server/deep/er.py",
        "conf/config.yaml",
        "conf/note.txt",
        "tests/test_a.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a = 1\n")
    hashes = [bundle_hash(tmp_path)]
    for name in ("conf/note.txt", "tests/test_a.py"):
        (tmp_path / name).write_text("a = 2\n")
        assert bundle_hash(tmp_path) == hashes[0]
    (tmp_path / "client" / "app.py").write_text("a = 2\n")
    hashes.append(bundle_hash(tmp_path))
    (tmp_path / "client" / "app.py").rename(tmp_path / "client" / "other.py")
    hashes.append(bundle_hash(tmp_path))
    (tmp_path / "privacy").mkdir()
    (tmp_path / "privacy" / "back_door.py").write_text("")
    hashes.append(bundle_hash(tmp_path))
    assert len(set(hashes)) == 4


def _leaves(value: object) -> Any:
    if isinstance(value, dict) and value:
        for inner in value.values():
            yield from _leaves(inner)
    else:
        yield value
