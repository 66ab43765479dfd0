"""The plan's aggregation holds in a fine-tuning: robust rules, the norms' tolerance, the server's optimiser.

One of three sites sends an update as long as the gate lets through, in a direction of its own.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context

from client.app import make_client_app
from client.exchanges import finetuning as answering
from federation.exchanges.finetuning import FinetunePlan
from federation.exchanges.pretraining import TrainReply
from federation.plan.plan import RunPlan
from meduet_models.meduet import FactorNetwork
from server.exchanges.finetuning import FinetunedRun, run_finetuning
from simulations.engines.in_process import InProcessGrid
from tests.rounds.test_finetuning_rounds import Hospital, Killed, Scans, agreed, grid_of

SITES = ("oslo", "lyon", "turin")
LIAR = "turin"


def moved(done: FinetunedRun, honest: FinetunedRun) -> float:
    """How far two models are apart."""
    theirs = honest.network.state_dict()
    return float(sum(((t - theirs[n]) ** 2).sum() for n, t in done.network.state_dict().items())) ** 0.5


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    """One site trains as everybody, and then goes far away in another direction."""
    train = answering.finetune

    def lie(network: Any, found: Any, *arguments: Any, **settings: Any) -> Any:
        done = train(network, found, *arguments, **settings)
        if SITES[found.site[0]] == LIAR:
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.ones_like(parameter))
        return done

    monkeypatch.setattr(answering, "finetune", lie)


def grid(plan: RunPlan, folder: Path, sites: tuple[str, ...] = SITES) -> InProcessGrid:
    def open_site(context: Context) -> Any:
        name = sites[int(context.node_config["partition-id"])]
        own = folder / "sites" / name
        own.mkdir(parents=True, exist_ok=True)
        return Hospital(own, Scans(SITES.index(name)), name)

    return InProcessGrid(make_client_app(open_site), len(sites), through_wire=True)


def fine_tuned(miniature: Any, folder: Path, **aggregation: Any) -> tuple[FinetunedRun, FinetunePlan]:
    plan = miniature.plan(sites=SITES, deadline_s=60.0, **aggregation)
    pretrained = FactorNetwork(plan.network, seed=5)
    finetuning = agreed(plan, pretrained, rounds=2)
    return run_finetuning(grid(plan, folder), plan, finetuning, pretrained, folder / "f"), finetuning


@pytest.mark.parametrize(
    "robust",
    [
        {"rule": "median", "norm_tolerance": 0.0},
        {"rule": "trimmed_mean", "trim": 0.34, "norm_tolerance": 0.0},
        {"rule": "krum", "norm_tolerance": 0.0},
        {"rule": "mean", "norm_tolerance": 3.0},
    ],
    ids=["median", "trimmed_mean", "krum", "norm_tolerance"],
)
def test_one_lying_site_moves_a_fine_tuning_no_further_than_the_rule_lets_it(
    miniature: Any, tmp_path: Path, lying: None, robust: dict[str, Any]
) -> None:
    undefended, _ = fine_tuned(miniature, tmp_path / "undefended", norm_tolerance=0.0, quorum=0.6)
    with pytest.MonkeyPatch.context() as truth:
        truth.setattr(f"{__name__}.LIAR", "nobody")
        honest, _ = fine_tuned(miniature, tmp_path / "honest", norm_tolerance=0.0, quorum=0.6)
    defended, _ = fine_tuned(miniature, tmp_path / "defended", quorum=0.6, **robust)
    assert moved(undefended, honest) > 4
    assert moved(defended, honest) < moved(undefended, honest) / 3


def test_a_server_optimiser_takes_the_step_and_goes_on_where_it_stopped(
    miniature: Any, tmp_path: Path
) -> None:
    plan = miniature.plan(deadline_s=60.0, optimiser="adam", learning_rate=0.01)
    pretrained = FactorNetwork(plan.network, seed=5)
    finetuning = agreed(plan, pretrained, rounds=3)

    def run(folder: Path, **watch: Any) -> FinetunedRun:
        return run_finetuning(grid_of(plan, folder, **watch), plan, finetuning, pretrained, folder / "f")

    whole, calls = run(tmp_path / "whole"), 0

    def kill(site: str, step: int, loss: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 23:  # in round 3: Adam has its moments
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "stopped", on_step=kill)
    resumed = run(tmp_path / "stopped")
    assert moved(resumed, whole) == 0
    plain = miniature.plan(deadline_s=60.0)
    averaged = run_finetuning(
        grid_of(plain, tmp_path / "plain"),
        plain,
        agreed(plain, pretrained, rounds=3),
        pretrained,
        tmp_path / "plain" / "f",
    )
    assert moved(averaged, whole) > 0.1


def test_a_reply_under_the_pretraining_plan_is_no_answer_to_a_fine_tuning(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = miniature.plan(deadline_s=60.0, quorum=0.6)
    pretrained = FactorNetwork(plan.network, seed=5)
    honest = TrainReply.to_record

    def under_the_plan(reply: TrainReply) -> Any:
        lie = reply.site == LIAR
        return honest(dataclasses.replace(reply, plan_sha256=plan.sha256) if lie else reply)

    monkeypatch.setattr(TrainReply, "to_record", under_the_plan)
    finetuning = agreed(plan, pretrained, rounds=1)
    done = run_finetuning(grid_of(plan, tmp_path), plan, finetuning, pretrained, tmp_path / "f")
    assert list(done.rounds[0]["refused"]) == [LIAR]
    assert set(done.rounds[0]["sites"]) == {"oslo", "lyon"}


def test_a_fine_tuning_travels_exactly_whatever_the_wire_of_its_run(miniature: Any, tmp_path: Path) -> None:
    exact = miniature.plan(deadline_s=60.0)
    coarse = dataclasses.replace(exact, release=dataclasses.replace(exact.release, wire_dtype="mxint8"))
    pretrained = FactorNetwork(exact.network, seed=5)
    ends = [
        run_finetuning(
            grid_of(plan, tmp_path / plan.sha256),
            plan,
            agreed(plan, pretrained, rounds=1),
            pretrained,
            tmp_path / plan.sha256 / "f",
        )
        for plan in (exact, coarse)
    ]
    assert moved(*ends) == 0
