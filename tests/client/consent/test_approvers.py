"""A plan runs once enough people have signed it, each with her own key; no line of the book counts twice."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import client.cli
from client.consent.approvals import Approvals
from client.consent.approvers import ApprovalRule, Signer, new_approver, read_signer
from client.exchanges.exchange import AskRefused
from client.settings import SiteConfig, approvals_of, load_site_config
from client.site import Site
from federation.bundle import running_bundle
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan
from federation.wire.wire import RefusalKind
from privacy.chain import Chain
from server.consortium.plans import publish

PASSPHRASE = "correct horse battery"
NAMES = ("anna", "ben", "clara")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("keys")
    return folder, {name: new_approver(folder / f"{name}.pem", PASSPHRASE) for name in NAMES}


@pytest.fixture
def signers(keys: tuple[Path, dict[str, str]]) -> dict[str, Signer]:
    folder, people = keys
    return {name: read_signer(folder / f"{name}.pem", PASSPHRASE, people) for name in NAMES}


@pytest.fixture
def config(tmp_path: Path, keys: tuple[Path, dict[str, str]]) -> SiteConfig:
    return SiteConfig(
        name="south", data_root=tmp_path / "absent", state_dir=tmp_path / "state", device="cpu",
        allow_non_private=True, approvals=ApprovalRule(needed=2, people=keys[1]),
    )  # fmt: skip


@pytest.fixture
def published(toy_plan: Callable[..., RunPlan]) -> PublishedPlan:
    return PublishedPlan(plan=toy_plan(), bundle_sha256=running_bundle())


def accepted(config: SiteConfig, plan: RunPlan) -> bool:
    site = Site(config)
    site.__dict__["tokenizer"] = type("Codec", (), {"sha256": "0" * 64})()
    try:
        site.accept(plan)
    except AskRefused as error:
        assert error.kind is RefusalKind.PLAN_NOT_ACCEPTED
        return False
    return True


def test_two_people_are_two_keys(
    config: SiteConfig, published: PublishedPlan, signers: dict[str, Signer]
) -> None:
    book = approvals_of(config)
    book.approve(published, signers["anna"])
    book.approve(published, signers["anna"])
    assert not accepted(config, published.plan)
    book.approve(published, dataclasses.replace(signers["anna"], name="ben"))  # her key under his name
    assert not accepted(config, published.plan)
    book.approve(published, signers["ben"])
    assert accepted(config, published.plan)
    assert set(book.approvers(published.sha256)) == {"anna", "ben"}


def test_anybody_may_stop_it_and_an_old_signature_does_not_count_again(
    config: SiteConfig, published: PublishedPlan, signers: dict[str, Signer]
) -> None:
    book = approvals_of(config)
    for name in ("anna", "ben"):
        book.approve(published, signers[name])
    old = [entry.record for entry in book.entries()]
    book.withdraw(published)
    assert not accepted(config, published.plan)
    for record in old:  # whoever may write to the book writes their lines once more
        Chain(book.path, purpose="approvals").append(record)
    assert not accepted(config, published.plan)
    # the same attack where lines are not signed: it succeeds
    plain = Approvals(config.state_dir)
    assert plain.approved_bundle(published.sha256) == running_bundle()


def test_a_signature_is_of_one_site_and_of_one_code(
    config: SiteConfig, published: PublishedPlan, signers: dict[str, Signer], tmp_path: Path
) -> None:
    north = dataclasses.replace(config, name="north", state_dir=tmp_path / "north")
    approvals_of(north).approve(published, signers["anna"])
    (config.state_dir).mkdir()
    book = config.state_dir / "approvals.jsonl"
    book.write_text((north.state_dir / "approvals.jsonl").read_text())
    assert set(approvals_of(north).approvers(published.sha256)) == {"anna"}
    assert not approvals_of(config).approvers(published.sha256)
    other = dataclasses.replace(published, bundle_sha256="f" * 64)
    approvals_of(north).approve(other, signers["ben"])
    assert approvals_of(north).approved_bundle(published.sha256) is None


def test_a_site_with_approvers_takes_no_unsigned_approval_and_one_without_takes_no_key(
    config: SiteConfig, published: PublishedPlan, signers: dict[str, Signer]
) -> None:
    with pytest.raises(ValueError, match="Expected an approver's key"):
        approvals_of(config).approve(published)
    with pytest.raises(ValueError, match="Expected no key"):
        Approvals(config.state_dir).approve(published, signers["anna"])
    Approvals(config.state_dir).approve(published)  # written past the rule, as by another program
    assert not approvals_of(config).approvers(published.sha256)


@pytest.mark.parametrize("damage", ["", "x", "AAAA", None, 7, ["a"], "ä" * 88])
def test_a_signature_that_is_none_is_nobodys(
    config: SiteConfig, published: PublishedPlan, signers: dict[str, Signer], damage: Any
) -> None:
    book = approvals_of(config)
    book.approve(published, signers["anna"])
    record = book.entries()[-1].record
    book.append({**record, "by": "ben", "signature": damage})
    assert set(book.approvers(published.sha256)) == {"anna"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"needed": 2}, "at most the number of people"),
        ({"needed": 0}, "from 1 to 16"),
        ({"needed": 2, "people": {"anna": "A" * 43 + "="}}, "at most the number of people"),
        ({"people": {"anna": "short"}}, "44 characters"),
        ({"needed": 1, "people": {"anna": "A" * 43 + "=", "ben": "A" * 43 + "="}}, "the same key"),
    ],
)
def test_a_rule_that_nobody_can_satisfy_is_refused(tmp_path: Path, values: Any, says: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps({"name": "south", "data_root": "d", "state_dir": "s", "approvals": values}))
    with pytest.raises(ValueError, match=says):
        load_site_config(path)


def test_nobody_is_asked_where_approval_is_implied(config: SiteConfig) -> None:
    with pytest.raises(ValueError, match="Expected plan_approval: required"):
        dataclasses.replace(config, plan_approval="implied")


def test_a_key_opens_only_with_its_passphrase_and_is_not_written_over(
    keys: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, people = keys
    path = folder / "anna.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="passphrase opens"):
        read_signer(path, "another passphrase", people)
    with pytest.raises(ValueError, match="the key of one of ben"):
        read_signer(path, PASSPHRASE, {"ben": people["ben"]})
    with pytest.raises(ValueError, match="is there already"):
        new_approver(path, PASSPHRASE)
    with pytest.raises(ValueError, match="12 characters or more; got 5"):
        new_approver(tmp_path / "new.pem", "short")
    assert not (tmp_path / "new.pem").exists()


def test_two_people_approve_at_the_terminal(
    tmp_path: Path, toy_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[str] = []
    monkeypatch.setattr(Console, "input", lambda *_, **__: answers.pop(0))

    def typed(*words: str, status: int = 0) -> str:
        screen = io.StringIO()
        assert client.cli.main(words, Console(file=screen, width=300)) == status, screen.getvalue()
        return screen.getvalue()

    people = {}
    for name in ("anna", "ben"):
        answers += [PASSPHRASE, PASSPHRASE]
        said = typed("approver", name, "--out", str(tmp_path / f"{name}.pem"))
        people[name] = said.rsplit(f"{name}: ", 1)[1].strip()
    settings = tmp_path / "site.yaml"
    (tmp_path / "scans").mkdir()
    site = {"name": "south", "data_root": "scans", "state_dir": "state", "allow_non_private": True}
    settings.write_text(json.dumps({**site, "approvals": {"needed": 2, "people": people}}))
    (tmp_path / "plan.json").write_text(toy_plan().to_json())
    plan, _ = publish(tmp_path / "plan.json", tmp_path / "plans")
    config = ("--config", str(settings))
    said = typed("plan", "show", str(plan), *config)
    assert "2 needed; so far nobody" in said and "--key FILE" in said
    sha256 = PublishedPlan.from_json(plan.read_text()).sha256
    assert "Expected an approver's key" in typed("plan", "approve", sha256, *config, status=2)
    answers += ["not the passphrase"]
    key = ("--key", str(tmp_path / "anna.pem"))
    assert "passphrase opens" in typed("plan", "approve", sha256, *key, *config, status=2)
    answers += [PASSPHRASE]
    said = typed("plan", "approve", sha256, *key, *config)
    assert "Approved by anna" in said and "does not run yet" in said and "so far anna" in said
    answers += [PASSPHRASE]
    said = typed("plan", "approve", sha256, "--key", str(tmp_path / "ben.pem"), *config)
    assert "Approved by ben" in said and "does not run yet" not in said
    assert "not approved" not in typed("plan", "list", *config)
    typed("plan", "withdraw", sha256, *config)
    assert "so far nobody" in typed("plan", "list", *config)
