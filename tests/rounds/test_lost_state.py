"""A site that lost its state of training costs time only: the run goes on with it, at quorum 1, in the same
round.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from client.app import make_client_app
from federation.plan import RunPlan
from server.app import run
from simulations.engines.in_process import InProcessGrid
from tests.rounds.test_meduet_rounds import small
from tests.worlds import Hospital, Latents

LAST = 4


class Spoiled(InProcessGrid):
    """Before the questions of a kind (and round) go out, something happens at the last site."""

    def __init__(
        self, plan: RunPlan, folder: Path, route: str, round_number: str, spoil: Callable[[Path], None]
    ) -> None:
        def open_site(context: Context) -> Hospital:
            index = int(context.node_config["partition-id"])
            name = plan.participants[index]
            return Hospital(folder / name, Latents([index]), name)

        super().__init__(make_client_app(open_site), len(plan.participants), through_wire=True)
        self._when, self._spoil = (route, round_number), [spoil]
        self._spoilt = folder / plan.participants[-1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        if any((m.metadata.message_type, m.metadata.group_id) == self._when for m in sent):
            while self._spoil:
                self._spoil.pop()(self._spoilt)
        return super().push_messages(sent)


@pytest.fixture
def plan(miniature: Any) -> RunPlan:
    plan = small(miniature, quorum=1.0)
    return dataclasses.replace(plan, training=dataclasses.replace(plan.training, rounds=LAST))


def lose(site: Path) -> None:
    shutil.rmtree(site / "state")


def lose_the_start(site: Path) -> None:
    (start,) = (site / "state").rglob("round-0000.safetensors")
    start.unlink()


def flip(site: Path) -> None:
    newest = max((site / "state").rglob("round-*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


@pytest.mark.parametrize("spoil", [lose, lose_the_start, flip])
def test_a_site_that_lost_its_state_is_in_every_round_of_a_run_that_waits_for_all(
    plan: RunPlan, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    grid = Spoiled(plan, tmp_path / "sites", "train.round", "3", spoil)
    metrics = run(grid, plan, tmp_path / "run").metrics
    assert [sorted(one["sites"]) for one in metrics["rounds"]] == [sorted(plan.participants)] * LAST
    assert [one["refused"] for one in metrics["rounds"]] == [{}] * LAST
    assert sorted(metrics["erasure"]["sites"]) == sorted(plan.participants)


def test_a_site_that_lost_its_state_after_the_last_round_still_tells_its_sums(
    plan: RunPlan, tmp_path: Path
) -> None:
    whole = run(Spoiled(plan, tmp_path / "a", "none", "", lose), plan, tmp_path / "whole")
    lost = run(Spoiled(plan, tmp_path / "b", "query.erasure", "", lose), plan, tmp_path / "lost")
    assert sorted(lost.metrics["erasure"]["sites"]) == sorted(plan.participants)
    for name, tensor in whole.shared.items():  # content takes nothing of what stays home
        assert torch.equal(lost.shared[name], tensor), name
