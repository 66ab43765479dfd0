"""One reply ends nobody's run: whole runs of the real model in which one site lies in one answer, at every
question that is not a round. Each of these lies ended the run for everybody, or moved what they all share."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import make_client_app
from federation.exchanges.erasure import ERASURE, ErasureReply
from federation.exchanges.probes import FACTORS, HITS, PROBES, ProbeReply
from federation.exchanges.survey import SURVEY, SurveyReply
from federation.plan.plan import ProbePlan, RunPlan, TrainingPlan
from server.app import RunResult, run
from simulations.engines.in_process import InProcessGrid
from tests.rounds.test_probes import Aged
from tests.worlds import Hospital

LIAR = "lyon"
Lie = Callable[[Any], Any]


class Lying(ClientApp):
    """Sites, one of which changes its reply to the question of this number on a route."""

    def __init__(self, inner: ClientApp, route: str, number: int, reply: type[Any], lie: Lie) -> None:
        super().__init__()
        self._inner, self._asked, self._number = inner, 0, number
        self._route, self._reply, self._lie = route, reply, lie

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self._inner(message, context)
        if message.metadata.message_type == self._route and context.node_config["partition-id"] == 1:
            self._asked += 1
            if self._asked == self._number:
                lie = self._lie(self._reply.from_record(reply.content))
                reply = Message(lie.to_record(), reply_to=message)
        return reply


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    plan: RunPlan = miniature.plan(deadline_s=300.0, quorum=0.6)
    training = TrainingPlan(rounds=1, steps_per_round=1, batch_size=4, warmup=0.0)
    return dataclasses.replace(plan, training=training)


def go(
    plan: RunPlan, folder: Path, route: str, reply: type[Any], lie: Lie, number: int = 1
) -> tuple[RunResult, dict[str, Any]]:
    def open_site(context: Context) -> Hospital:
        index = int(context.node_config["partition-id"])
        name = plan.sites[index]
        return Hospital(folder / "sites" / name, Aged(index, 18), name)

    app = Lying(make_client_app(open_site), route, number, reply, lie)
    result = run(InProcessGrid(app, 3, through_wire=True), plan, folder)
    assert result.model is not None  # the run came to its end
    return result, result.metrics


def negative(reply: ErasureReply) -> ErasureReply:
    return dataclasses.replace(reply, moments={n: -t for n, t in reply.moments.items()})


def too_long(reply: ErasureReply) -> ErasureReply:
    """The count is right, and the sum is longer than so many patients' can be."""
    sums = reply.moments["sums"].clone()
    sums[1:] *= 1e6
    return dataclasses.replace(reply, moments={**reply.moments, "sums": sums})


def more_pooled(reply: ErasureReply) -> ErasureReply:
    """Pooled content of more patients than have codes."""
    pooled = reply.moments["pooled"].clone()
    pooled[0] += 1
    return dataclasses.replace(reply, moments={**reply.moments, "pooled": pooled})


def halves(reply: ErasureReply) -> ErasureReply:
    sums = reply.moments["sums"].clone()
    sums[0] += 0.5
    return dataclasses.replace(reply, moments={**reply.moments, "sums": sums})


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (negative, "at least 5 patients"),
        (too_long, "longer"),
        (halves, "whole patients"),
        (more_pooled, "pooled content of nobody or of"),
    ],
)
def test_code_sums_of_nobody_do_not_end_the_run_at_its_last_step(
    plan: RunPlan, tmp_path: Path, lie: Lie, reason: str
) -> None:
    _, metrics = go(plan, tmp_path, ERASURE.route, ErasureReply, lie)
    assert reason in metrics["erasure"]["refused"][LIAR]
    assert set(metrics["erasure"]["sites"]) == {"oslo", "turin"}


def three_thousand_million(reply: ProbeReply) -> ProbeReply:
    factors = reply.sums[FACTORS].clone()
    factors[:, 0] = 3e9
    return dataclasses.replace(reply, sums={**reply.sums, FACTORS: factors})


def hits_of_nobody(reply: ProbeReply) -> ProbeReply:
    return dataclasses.replace(reply, sums={HITS: torch.zeros(3, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("lie", "number", "reason"),
    [
        (three_thousand_million, 1, "1048576 whole"),
        (hits_of_nobody, 2, "whose sums"),
    ],
)
def test_probe_sums_and_hits_of_no_patients_end_no_run(
    plan: RunPlan, tmp_path: Path, lie: Lie, number: int, reason: str
) -> None:
    probed = dataclasses.replace(plan, probes=ProbePlan(every_rounds=1, folds=3))
    _, metrics = go(probed, tmp_path, PROBES.route, ProbeReply, lie, number)
    assert reason in metrics["rounds"][0]["federated_probes"]["refused"][LIAR]
    assert metrics["rounds"][0]["federated_probes"]["readings"]


def claiming(patients: float) -> Lie:
    def lie(reply: SurveyReply) -> SurveyReply:
        moments = {name: torch.zeros_like(tensor) for name, tensor in reply.moments.items()}
        moments["count"] = torch.full_like(reply.moments["count"], patients)
        count = int(patients)
        return dataclasses.replace(reply, moments=moments, num_patients=count, num_scans=count)

    return lie


def test_patients_of_nothing_do_not_set_the_federations_latent_deviation(
    plan: RunPlan, tmp_path: Path
) -> None:
    def deviation(name: str, lie: Lie) -> tuple[torch.Tensor, dict[str, Any]]:
        result, metrics = go(plan, tmp_path / name, SURVEY.route, SurveyReply, lie)
        return result.shared["latent_deviation"], metrics["survey"]["refused"]

    honest, refused = deviation("honest", lambda reply: reply)
    assert not refused
    within, refused = deviation("most", claiming(float(1 << 20)))
    assert not refused and bool((within > honest / 3).all())
    beyond, refused = deviation("beyond", claiming(1e15))
    assert "1048576" in refused[LIAR] and bool((beyond > honest / 3).all())
