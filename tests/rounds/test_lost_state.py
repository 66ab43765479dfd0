"""A site that lost its state of training costs time only: the run goes on with it, at quorum 1, in the same
round.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from client.app import make_client_app
from client.books.books import read_books
from client.exchanges import pretraining
from client.exchanges.exchange import AskRefused
from federation.exchanges.pretraining import TrainAsk
from federation.plan.plan import RunPlan
from federation.wire.wire import RefusalKind
from privacy.chain import read_chain
from privacy.ledger import AnsweredBefore
from server.app import RunObserver, run
from server.checkpoints import Checkpoints
from server.deployment.status import read_status
from server.model import MeduetModel
from server.server_app import run_in_folder
from simulations.engines.in_process import InProcessGrid
from strategies.quorum import OutOfReach
from tests.rounds.test_meduet_rounds import small
from tests.worlds import Hospital, Latents

LAST = 4


class Closed(Hospital):
    """A hospital that answers nothing at this hour."""

    def accept(self, plan: RunPlan, finetuning_sha256: str = "") -> None:
        raise AskRefused("Expected other hours.", RefusalKind.OUTSIDE_HOURS)


class Spoiled(InProcessGrid):
    """Before the questions of a kind (and round) go out, something happens at the last site. Or nothing does;
    or it is `closed`."""

    def __init__(
        self,
        plan: RunPlan,
        folder: Path,
        route: str = "none",
        round_number: str = "",
        spoil: Callable[[Path], None] = lambda site: None,
        closed: bool = False,
    ) -> None:
        def open_site(context: Context) -> Hospital:
            index = int(context.node_config["partition-id"])
            name = plan.participants[index]
            kind = Closed if closed and name == plan.participants[-1] else Hospital
            return kind(folder / name, Latents([index]), name)

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
    whole = run(Spoiled(plan, tmp_path / "a"), plan, tmp_path / "whole")
    lost = run(Spoiled(plan, tmp_path / "b", "query.erasure", "", lose), plan, tmp_path / "lost")
    assert sorted(lost.metrics["erasure"]["sites"]) == sorted(plan.participants)
    for name, tensor in whole.shared.items():  # content takes nothing of what stays home
        assert torch.equal(lost.shared[name], tensor), name


class Killed(BaseException):
    """As if the centre's process had ended."""


class DiesAfter(RunObserver):
    """The centre dies when a round is averaged, before its checkpoint."""

    def __init__(self, round_number: int) -> None:
        self._at = round_number

    def on_round_end(self, round_number: int, shared: Any, metrics: Any) -> dict[str, Any]:
        if round_number == self._at:
            raise Killed
        return {}


def ledger_of(site: Path) -> list[dict[str, Any]]:
    return [entry.record for entry in read_chain(site / "ledger.jsonl", "ledger")]


@pytest.mark.parametrize(("quorum", "answered"), [(1.0, 1), (1.0, 3), (0.5, 3)])
def test_a_site_that_lost_its_state_and_what_it_had_answered_is_in_that_round_again(
    plan: RunPlan, tmp_path: Path, quorum: float, answered: int
) -> None:
    plan = dataclasses.replace(plan, aggregation=dataclasses.replace(plan.aggregation, quorum=quorum))
    sites, last = tmp_path / "sites", tmp_path / "sites" / plan.participants[-1]
    with pytest.raises(Killed):
        run(Spoiled(plan, sites), plan, tmp_path / "run", observer=DiesAfter(answered))
    shutil.rmtree(last / "state")
    shutil.rmtree(last / "answers")
    metrics = run(Spoiled(plan, sites), plan, tmp_path / "run").metrics
    assert [sorted(one["sites"]) for one in metrics["rounds"]] == [sorted(plan.participants)] * LAST
    assert [one["refused"] for one in metrics["rounds"]] == [{}] * LAST
    events = [line["event"] for line in ledger_of(last)]
    assert events.count("reserve") == events.count("settle") == LAST + 2  # survey, rounds, erasure: once each
    assert events.count("anew") == (0 if answered == 1 else 1)  # from the start alone, the same comes again
    read_books(last)


def test_a_site_that_lost_what_it_had_answered_still_refuses_another_question_for_the_place(
    plan: RunPlan, tmp_path: Path
) -> None:
    sites, last = tmp_path / "sites", tmp_path / "sites" / plan.participants[-1]
    with pytest.raises(Killed):
        run(Spoiled(plan, sites), plan, tmp_path / "run", observer=DiesAfter(3))
    shutil.rmtree(last / "state")
    shutil.rmtree(last / "answers")
    before = ledger_of(last)
    kept = Checkpoints(tmp_path / "run" / "checkpoints", plan.sha256).latest()
    assert kept is not None and kept.round == 2
    home = MeduetModel(plan).start()[1]
    for shift, refused in ((1e-3, True), (0.0, False), (1e-3, True)):
        shared = {name: tensor + shift for name, tensor in kept.shared.items()}
        ask = TrainAsk(plan_json=plan.to_json(), round=3, shared=shared, bank=kept.bank, home=home)
        site = Hospital(last, Latents([len(plan.participants) - 1]), plan.participants[-1])
        with pytest.raises(AnsweredBefore, match="Nothing was read") if refused else nullcontext():
            pretraining.ANSWER.once(site, ask, plan)
    assert [line["event"] for line in ledger_of(last)[len(before) :]] == ["anew"]


def test_a_centre_that_goes_back_and_averages_others_ends_in_one_line_that_says_what_to_do(
    plan: RunPlan, tmp_path: Path
) -> None:
    sites, folder = tmp_path / "sites", tmp_path / "run"
    plan = dataclasses.replace(plan, aggregation=dataclasses.replace(plan.aggregation, quorum=0.5))
    with pytest.raises(Killed):
        run(Spoiled(plan, sites), plan, folder, observer=DiesAfter(4))
    for newer in ("round-0003*", "round-0002*"):  # an older backup of the centre is put back
        for path in (folder / "checkpoints").glob(newer):
            path.unlink()

    for _ in range(2):  # round 2 goes on without the last site, so round 3 is another
        with pytest.raises(OutOfReach) as over:
            run_in_folder(Spoiled(plan, sites, closed=True), plan, folder)
        assert "\n" not in str(over.value) and "run again" not in str(over.value)
        assert re.search(r"to round 3; got 0\. 2 answered another .* publish a new plan\.", str(over.value))
    status = read_status(folder)
    assert status is not None and status["state"] == "refused"  # nobody submits it again by itself
    assert Checkpoints(folder / "checkpoints", plan.sha256).rounds()[-1] == 2
