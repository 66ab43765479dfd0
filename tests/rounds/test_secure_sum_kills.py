"""Rounds as secure sums, killed at any reply and after any write: the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from torch import Tensor

from client.books.answers import KeptAnswers
from client.secrets.sum_secrets import SumSecrets
from privacy.ledger import Ledger
from server.sum_records import SumRecords
from tests.rounds.secure_sums import SITES, Killed, Sites, a_plan, go


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    plan, folder = a_plan(SITES[:3], rounds=2, quorum=1.0), tmp_path_factory.mktemp("undisturbed")
    return go(plan, folder, Sites(plan, folder)).shared


@pytest.mark.parametrize("at", [1, 3, 4, 6, 7, 9, 10, 12])
def test_a_run_killed_at_any_reply_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Tensor], at: int
) -> None:
    plan = a_plan(SITES[:3], rounds=2, quorum=1.0)
    sites = Sites(plan, tmp_path)
    inner = sites._inner

    def dies(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if sites.counted + 1 == at:
            raise Killed
        return reply

    sites._inner = dies  # type: ignore[assignment]
    with pytest.raises(Killed):
        go(plan, tmp_path, sites)
    resumed = go(plan, tmp_path, Sites(plan, tmp_path))
    assert all(torch.equal(resumed.shared[name], undisturbed[name]) for name in undisturbed)
    assert resumed.report.attempt == 1


WRITES = [
    (SumSecrets, "keep", (1, 5, 8)),
    (KeptAnswers, "write", (2, 5, 8, 11)),
    (Ledger, "settle", (8, 11)),
    (SumRecords, "write", (1, 2, 3)),
]


@pytest.fixture(scope="module")
def undisturbed_round(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    plan, folder = a_plan(SITES[:3], quorum=1.0), tmp_path_factory.mktemp("undisturbed")
    return go(plan, folder, Sites(plan, folder)).shared


@pytest.mark.parametrize(
    ("kind", "name", "number"), [(kind, name, n) for kind, name, numbers in WRITES for n in numbers]
)
def test_a_round_killed_after_any_write_ends_in_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_round: dict[str, Tensor],
    kind: type,
    name: str,
    number: int,
) -> None:
    plan = a_plan(SITES[:3], quorum=1.0)
    write, counted = getattr(kind, name), [0]

    def dies(self: Any, *given: Any, **named: Any) -> Any:
        done = write(self, *given, **named)
        counted[0] += 1
        if counted[0] == number:
            raise Killed
        return done

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, dies)
        with pytest.raises(Killed):
            go(plan, tmp_path, Sites(plan, tmp_path))
    resumed = go(plan, tmp_path, Sites(plan, tmp_path)).shared
    assert all(torch.equal(resumed[name], undisturbed_round[name]) for name in undisturbed_round)
