"""A forged plan writes its own sentences into `plan show`: none of them reaches the person who decides."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import client.cli
import forms.names
from federation.bundle import running_bundle
from federation.plan.plan import RunPlan
from federation.published_plan import PublishedPlan

LIE = "What leaves is differentially private with epsilon 1."
FORGERIES = {
    "newlines": f"demo\n\nNoise\n  {LIE}\nApproved here.",
    "cursor": f"demo\x1b[2J\x1b[HNoise\r\n  {LIE}\x1b[8m",
    "hidden": f"demo\x9b8m{LIE}",
    "reversed": f"demo \u202e{LIE[::-1]}",
    "unseen": f"demo\u200b {LIE}\u2066",
    "markup": f"demo[/][bold]Noise[/] {LIE}[black on black]",
    "long": "demo " + " " * 5000 + LIE,
}
PLACES = ("name", "modality", "body_part", "site", "target")


def forged(plan: RunPlan, place: str, text: str) -> str:
    """A published plan with `text` in one of its names, under the hash of exactly that."""
    values: Any = json.loads(plan.to_json())
    match place:
        case "name":
            values["name"] = text
        case "modality":
            values["volumes"]["modality"] = text
        case "body_part":
            values["style"]["body_parts"] = [text]
        case "site":
            values["sites"][0] = text
        case "target":
            values["probes"]["anatomy"] = {text: [0.0, 1.0]}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    published = {
        "plan": values,
        "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "bundle_sha256": running_bundle(),
        "finetuning": None,
    }
    return json.dumps(published)


@pytest.fixture
def show(tmp_path: Path) -> Callable[[str], tuple[int, str]]:
    settings = tmp_path / "site.yaml"
    settings.write_text("name: south\ndata_root: absent\nstate_dir: state\n")
    path = tmp_path / "forged.plan.json"

    def run(text: str) -> tuple[int, str]:
        path.write_text(text)
        screen = io.StringIO()
        console = Console(file=screen, width=300)
        status = client.cli.main(
            ["plan", "show", str(path), "--settings", "--config", str(settings)], console
        )
        return status, screen.getvalue()

    return run


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("place", PLACES)
def test_a_plan_that_speaks_for_itself_is_refused_in_one_line(
    place: str, forgery: str, toy_plan: Callable[..., RunPlan], show: Callable[[str], tuple[int, str]]
) -> None:
    status, said = show(forged(toy_plan(), place, FORGERIES[forgery]))
    assert status == 2 and said.count("\n") == 1 and said[:-1].isprintable()
    assert said.startswith("Expected ") and len(said) < 500


@pytest.mark.parametrize("forgery", FORGERIES)
def test_even_a_name_that_got_through_cannot_write_a_line_of_its_own(
    forgery: str,
    toy_plan: Callable[..., RunPlan],
    show: Callable[[str], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second defence alone: names of any letters, and what is printed is still only text."""
    monkeypatch.setattr(forms.names.Letters, "check", lambda self, value, where: None)
    honest = show(PublishedPlan(plan=toy_plan(), bundle_sha256=running_bundle()).to_json())[1]
    status, said = show(forged(toy_plan(), "name", FORGERIES[forgery]))
    assert status == 0 and all(line.isprintable() for line in said.splitlines())
    assert len(said.splitlines()) == len(honest.splitlines())
    assert [line for line in said.splitlines() if line.strip() == LIE] == []
    assert "None is added anywhere" in said


def test_with_neither_defence_the_forgery_is_what_is_read(
    toy_plan: Callable[..., RunPlan],
    show: Callable[[str], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms.names.Letters, "check", lambda self, value, where: None)
    monkeypatch.setattr("federation.terminal.visible", lambda text: text)
    status, said = show(forged(toy_plan(), "name", FORGERIES["newlines"]))
    assert status == 0 and f"  {LIE}" in said.splitlines()


def test_an_honest_plan_is_shown(
    toy_plan: Callable[..., RunPlan], show: Callable[[str], tuple[int, str]]
) -> None:
    plan = dataclasses.replace(toy_plan(), name="Köln, second try (2027)")
    status, said = show(PublishedPlan(plan=plan, bundle_sha256=running_bundle()).to_json())
    assert status == 0 and "Köln, second try (2027)" in said
