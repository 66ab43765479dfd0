"""Curves of a run: every loss term that was told has a panel, also one that nobody has described."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from meduet_models.objective.settings import LossWeights
from simulations.report.figures import draw_losses, loss_terms


def a_round(number: int, **losses: float) -> dict[str, Any]:
    return {"round": number, "sites": {"north": {"loss": losses}, "south": {"loss": {"total": 1.0}}}}


def test_every_term_of_the_objective_has_a_panel_with_a_title(tmp_path: Path) -> None:
    named = {field.name: 0.5 for field in fields(LossWeights)}
    rounds = [a_round(1, total=2.0, anchor=0.1, **named), a_round(2, total=1.0, anchor=0.1, **named)]
    terms = loss_terms(rounds)
    assert set(terms) == {"total", "anchor", *named}
    assert all(title and "_" not in title for title in terms.values())
    assert draw_losses(rounds, tmp_path / "losses.png").stat().st_size > 10_000


def test_a_term_that_nobody_described_is_shown_by_its_name_whichever_hospital_told_it(tmp_path: Path) -> None:
    rounds = [{"round": 1, "sites": {"a": {"loss": {"total": 1.0}}, "b": {"loss": {"gossip": 1.0}}}}]
    assert loss_terms(rounds)["gossip"] == "gossip"
    draw_losses(rounds, tmp_path / "losses.png")
