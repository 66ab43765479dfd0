"""Rounds as secure sums: whoever is lost, the sum is that of the survivors, or the round is burnt."""

from pathlib import Path

import pytest
import torch

from federation.exchanges.secure_sum import (
    SUM_MASKED,
    SUM_UNMASK,
)
from federation.journal import Journal
from federation.reply_book import ReplyBook
from privacy.secure_sum.ring import Ring
from server.exchanges.pretraining import pretraining
from server.model import MeduetModel
from simulations.engines.in_process import InProcessGrid
from strategies.content_share import ContentShare
from strategies.quorum import Roster, RoundFailed
from tests.rounds.secure_sums import ROUTES, SITES, Sites, a_plan, centre, go, moved_by, start_of


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
    assert first.refused.keys() == set(SITES[:2])
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
