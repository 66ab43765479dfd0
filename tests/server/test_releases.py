"""What sites released and what was made of it is told; a withdrawal marks all of that, and no more."""

import json
import logging
from pathlib import Path

import pytest
import torch

import server.cli
from federation.journal import Journal
from meduet_models.published.pretrained import load_pretrained
from meduet_models.published.withdrawals import MARKS, marked
from meduet_models.weights import save_weights, sha256_of_file
from server.releases import register, withdraw
from tests.published_weights import published

RECEIVED = [("north", "query.survey", 0), ("north", "train.round", 1), ("valley", "train.round", 2)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two sites in the survey, of which the second came to the rounds only in the second."""
    folder = published(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    for number in (1, 2):
        path = folder / "checkpoints" / f"round-{number:04d}.safetensors"
        save_weights(path, {"w": torch.tensor([float(number)])}, {})
    journal = Journal(folder / "journal.jsonl")
    for site, to, number in RECEIVED:
        said = {"kind": "reply", "site": site, "to": to, "sha256": "a" * 64, "bytes": 8, "plan": "b" * 64}
        journal.append(said | ({"round": number} if number else {}))
    return folder


def typed(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    assert server.cli.main([str(word) for word in words]) == status
    return capsys.readouterr().out


def test_a_register_says_whose_releases_went_into_each_file(run: Path) -> None:
    found = register(run)
    assert [(one.site, one.kind, one.round) for one in found.received] == RECEIVED
    made = {one.file: one for one in found.made}
    assert made["checkpoints/round-0001.safetensors"].sites == ("north",)
    assert made["checkpoints/round-0002.safetensors"].sites == ("north", "valley")
    assert made["model.safetensors"].sites == ("north", "valley")
    assert made["model.safetensors"].sha256 == sha256_of_file(run / "model.safetensors")
    assert not any(one.withdrawn for one in found.made)


def test_a_withdrawal_marks_what_was_made_of_it_and_stays_in_the_journal(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_pretrained(run / "model.safetensors")
    assert not caplog.records
    withdraw(run, "valley", "a patient asked us to")
    made = {one.file: one.withdrawn for one in register(run).made}
    assert made == {
        "checkpoints/round-0001.safetensors": (), "checkpoints/round-0002.safetensors": ("valley",),
        "model.safetensors": ("valley",),
    }  # fmt: skip
    last = Journal(run / "journal.jsonl").entries()[-1].record
    assert last["kind"] == "withdrawal" and last["reason"] == "a patient asked us to"
    assert set(last["descendants"]) == {"checkpoints/round-0002.safetensors", "model.safetensors"}
    with caplog.at_level(logging.WARNING):
        load_pretrained(run / "model.safetensors")
    assert "withdrew since" in caplog.text and "valley" not in caplog.text
    assert (run / MARKS).stat().st_mode & 0o777 == 0o600


def test_a_model_that_was_trained_again_is_not_marked(run: Path) -> None:
    withdraw(run, "valley", "asked")
    save_weights(run / "model.safetensors", {"w": torch.zeros(1)}, {})
    assert marked(run / "model.safetensors") == ()


def test_two_sites_are_marked_both_and_the_same_one_once(run: Path) -> None:
    for site in ("valley", "north", "valley"):
        withdraw(run, site, "asked")
    assert marked(run / "model.safetensors") == ("north", "valley")


@pytest.mark.parametrize(("site", "reason"), [("harbour", "asked"), ("valley", " "), ("", "asked")])
def test_what_cannot_be_withdrawn_writes_nothing(run: Path, site: str, reason: str) -> None:
    before = (run / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match="Nothing was written"):
        withdraw(run, site, reason)
    assert (run / "journal.jsonl").read_bytes() == before and not (run / MARKS).exists()


def test_damaged_marks_are_said_and_not_passed_over(run: Path) -> None:
    withdraw(run, "valley", "asked")
    (run / MARKS).write_text('{"model.safetensors": []}')
    with pytest.raises(ValueError, match="marks of withdrawal"):
        load_pretrained(run / "model.safetensors")


def test_at_the_terminal(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = typed(capsys, "releases", "show", run)
    assert "query.survey" in said and "nobody" in said
    said = typed(capsys, "releases", "withdraw", "valley", run, "--reason", "asked")
    assert "model.safetensors" in said and "round-0001" not in said and "Copies elsewhere" in said
    shown = json.loads(typed(capsys, "releases", "show", run, "--json"))
    assert [one["withdrawn"] for one in shown["received"]] == [False, False, True]
    typed(capsys, "releases", "show", tmp_path, status=2)
    typed(capsys, "releases", "withdraw", "harbour", run, "--reason", "asked", status=2)
