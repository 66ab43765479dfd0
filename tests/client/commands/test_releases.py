"""A hospital's register: one row for each thing that left, with plan, approval and what was charged."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from client.cli import main
from client.settings import approvals_of, load_site_config
from federation.bundle import running_bundle
from federation.published_plan import PublishedPlan
from tests.audit.released import Answered, toy_plan


def said(*words: str, status: int = 0) -> str:
    screen = io.StringIO()
    assert main(["releases", *words], Console(file=screen, width=300)) == status, screen.getvalue()
    return screen.getvalue()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    answered = Answered(tmp_path, 18, 3, toy_plan()).ask("survey", "erasure")
    path = tmp_path / "site.yaml"
    path.write_text(f"name: north\ndata_root: data\nstate_dir: {answered.site.state_dir}\n")
    published = PublishedPlan(plan=answered.plan, bundle_sha256=running_bundle())
    book = approvals_of(load_site_config(path))
    book.keep(published)
    book.approve(published)
    return path


def test_each_release_has_its_row_its_plan_and_who_approved_it(config: Path) -> None:
    text = said("--config", str(config))
    assert text.count("this site") == 2 and text.count("no noise") == 2 and "the centre" in text
    rows = json.loads(said("--config", str(config), "--json"))
    assert [row["kind"] for row in rows] == ["survey", "erasure"]
    journal = load_site_config(config).state_dir / "journal.jsonl"
    lines = [json.loads(line)["record"] for line in journal.read_text().splitlines()]
    assert [row["sha256"] for row in rows] == [line["sha256"] for line in lines if "ledger" in line]
    assert all(row["epsilon"] is None and row["plan"] == toy_plan().name for row in rows)


def test_an_edited_journal_and_none_at_all_are_said(config: Path, tmp_path: Path) -> None:
    journal = load_site_config(config).state_dir / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"survey"', '"round"', 1))
    assert "line 1" in said("--config", str(config), status=2)
    other = tmp_path / "other.yaml"
    other.write_text("name: north\ndata_root: data\nstate_dir: nothing-here\n")
    said("--config", str(other), status=2)
