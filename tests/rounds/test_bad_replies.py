import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, RecordDict

from federation.exchanges.pretraining import TrainReply
from federation.journal import Journal
from federation.wire.messages import Refusal, RefusalKind
from server.app import run
from simulations.engines.in_process import InProcessGrid
from strategies.aggregation import StreamingSum
from strategies.quorum import RoundFailed


def with_update(reply: TrainReply, **tensors: Any) -> TrainReply:
    return dataclasses.replace(reply, update={**reply.update, **tensors})


def nan(reply: TrainReply) -> Any:
    bad = reply.update["weight"].clone()
    bad[1, 1] = torch.nan
    return with_update(reply, weight=bad)


def without_weight(reply: TrainReply) -> Any:
    return dataclasses.replace(reply, update={"constant": reply.update["constant"]})


def examples(number: int) -> Any:
    return lambda reply: dataclasses.replace(reply, examples=number)


def other_version(reply: TrainReply) -> Any:
    record = reply.to_record()
    record.config_records["head"]["wire_version"] = 99
    return record


def metric(name: str, value: float) -> Any:
    def bad(reply: TrainReply) -> Any:
        record = reply.to_record()
        record.metric_records["metrics"][name] = value
        return record

    return bad


def with_array(record: RecordDict, name: str, data: bytes) -> RecordDict:
    arrays = record.array_records["update"]
    arrays[name] = Array(arrays[name].dtype, arrays[name].shape, arrays[name].stype, data)
    return record


def damaged_header(reply: TrainReply) -> Any:
    """One byte of it: numpy's own reader raises a SyntaxError."""
    record = reply.to_record()
    data = bytearray(record.array_records["update"]["float32"].data)
    data[data.index(b"'fortran_order'")] = ord("(")
    return with_array(record, "float32", bytes(data))


def seventy_dimensions(reply: TrainReply) -> Any:
    record = reply.to_record()
    arrays = record.array_records["update"]
    index = json.loads(arrays["index"].numpy().tobytes())
    index[0][2] += [1] * 70
    arrays["index"] = Array(np.frombuffer(json.dumps(index).encode(), dtype=np.uint8))
    return record


def deep_index(reply: TrainReply) -> Any:
    record = reply.to_record()
    record.array_records["update"]["index"] = Array(np.frombuffer(b"[" * 100_000, dtype=np.uint8))
    return record


def other_dtype(reply: TrainReply) -> Any:
    return dataclasses.replace(reply, wire_dtype="mxint8")


BAD = {
    "'loss.total' from": metric("loss.total", 1.7e308),
    "'seconds' from": metric("seconds", -1.0),
    "index of [name": seventy_dimensions,
    "got another header": damaged_header,
    "index in JSON": deep_index,
    "values as float32": other_dtype,
    "finite": nan,
    "shape": lambda reply: with_update(reply, weight=torch.ones(1)),
    "float32": lambda reply: with_update(reply, weight=reply.update["weight"].double()),
    "missing": without_weight,
    "no tensor": lambda reply: with_update(reply, stray=torch.ones(2)),
    "between 1": examples(0),
    "between 1 and": examples(-5),
    "between": examples(10**9),
    "L2 norm": lambda reply: with_update(reply, weight=torch.full((3, 4), 1e6)),
    "round 1": lambda reply: dataclasses.replace(reply, round=7),
    "plan": lambda reply: dataclasses.replace(reply, plan_sha256="0" * 64),
    "it says 'turin'": lambda reply: dataclasses.replace(reply, site="turin"),
    "it says 'atlantis'": lambda reply: dataclasses.replace(reply, site="atlantis"),
    "wire version": other_version,
    "refused: budget": lambda reply: Refusal(kind=RefusalKind.BUDGET, site="lyon"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_reply_is_put_aside_with_its_reason_and_the_round_goes_on_without_it(
    miniature: Any, tmp_path: Path, reason: str
) -> None:
    def tamper(site: str, kind: str, reply: Any) -> Any:
        return BAD[reason](reply) if (site, kind) == ("lyon", "train") else reply

    def absent(site: str, kind: str, reply: Any) -> Any:
        refusal = Refusal(kind=RefusalKind.INTERNAL, site=site)
        return refusal if (site, kind) == ("lyon", "train") else reply

    plan = miniature.plan(rounds=1, quorum=0.6)
    ends = {}
    for name, tampered in (("bad", tamper), ("absent", absent)):
        folder = tmp_path / name
        grid = InProcessGrid(miniature.client(folder / "sites", tamper=tampered), 3)
        ends[name] = run(grid, plan, folder, model=miniature.model(plan))
    report = ends["bad"].metrics["rounds"][0]
    assert reason in report["refused"]["lyon"]
    assert set(report["sites"]) == {"oslo", "turin"}
    for tensor, expected in zip(ends["bad"].shared.values(), ends["absent"].shared.values(), strict=True):
        assert torch.equal(tensor, expected)


def test_below_the_quorum_the_run_stops_with_its_checkpoint_and_the_reasons(
    miniature: Any, tmp_path: Path
) -> None:
    def tamper(site: str, kind: str, reply: Any) -> Any:
        late = kind == "train" and reply.round == 2 and site != "oslo"
        return Refusal(kind=RefusalKind.OUT_OF_MEMORY, site=site) if late else reply

    plan = miniature.plan(quorum=0.6)
    grid = InProcessGrid(miniature.client(tmp_path / "sites", tamper=tamper), 3)
    with pytest.raises(RoundFailed, match=r"2 of 3 sites.*lyon: refused: out_of_memory") as failure:
        run(grid, plan, tmp_path, model=miniature.model(plan))
    assert set(failure.value.reasons) == {"lyon", "turin"}
    assert (tmp_path / "checkpoints" / "round-0001.safetensors").is_file()
    healthy = InProcessGrid(miniature.client(tmp_path / "sites"), 3)
    other = InProcessGrid(miniature.client(tmp_path / "never" / "sites"), 3)
    resumed = run(healthy, plan, tmp_path, model=miniature.model(plan)).shared
    never = run(other, plan, tmp_path / "never", model=miniature.model(plan)).shared
    assert all(torch.equal(resumed[name], never[name]) for name in never)


@pytest.mark.parametrize("named", [("oslo", "turin", "turin"), ("turin", "lyon", "turin")])
def test_a_site_that_answers_as_another_is_put_aside_and_no_number_stands_under_a_wrong_name(
    miniature: Any, tmp_path: Path, named: tuple[str, ...]
) -> None:
    plan = miniature.plan(rounds=1, quorum=0.3)
    grid = InProcessGrid(miniature.client(tmp_path / "sites", named), 3)
    report = run(grid, plan, tmp_path, model=miniature.model(plan)).metrics["rounds"][0]
    honest = {site for site, said in zip(plan.sites, named, strict=True) if site == said}
    assert set(report["sites"]) == honest
    for site, said in zip(plan.sites, named, strict=True):
        if site != said:
            wrong = f"Expected a reply of '{site}', as this node is registered; it says '{said}'."
            assert report["refused"][site] == wrong
    entered = [
        line.record["site"] for line in Journal(tmp_path / "journal.jsonl").entries() if "site" in line.record
    ]
    assert set(entered) == honest


def test_a_node_that_is_no_site_of_the_plan_is_never_asked(miniature: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def note(site: str, kind: str, reply: Any) -> Any:
        asked.append(site)
        return reply

    plan = miniature.plan(rounds=1)
    sites = ("oslo", "lyon", "turin", "atlantis")
    grid = InProcessGrid(miniature.client(tmp_path / "sites", sites, note), 4)
    result = run(grid, plan, tmp_path, model=miniature.model(plan))
    assert "atlantis" not in asked
    assert set(result.metrics["rounds"][0]["sites"]) == {"oslo", "lyon", "turin"}


def test_too_few_connected_sites_are_awaited_until_the_deadline_and_no_longer(
    miniature: Any, tmp_path: Path
) -> None:
    plan = miniature.plan(deadline_s=0.2)
    grid = InProcessGrid(miniature.client(tmp_path / "sites"), 2)
    with pytest.raises(RoundFailed, match=r"connected sites within 0\.2 s; got 2"):
        run(grid, plan, tmp_path, model=miniature.model(plan))


def test_a_failure_that_nobody_thought_of_puts_the_reply_aside_and_leaves_the_sum_as_before(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the addition, where part of a reply is in the sum already."""
    subtracted = []
    add, subtract = StreamingSum._add, StreamingSum._subtract

    def failing(self: StreamingSum, pieces: Any, added: Any) -> float:
        squares = add(self, pieces, added)
        if self.num_replies == 1:
            raise MemoryError("patient Smith")
        return squares

    def noted(self: StreamingSum, pieces: Any) -> None:
        subtracted.append(len(pieces))
        subtract(self, pieces)

    monkeypatch.setattr(StreamingSum, "_add", failing)
    monkeypatch.setattr(StreamingSum, "_subtract", noted)
    plan = miniature.plan(rounds=1, quorum=0.3)
    grid = InProcessGrid(miniature.client(tmp_path / "sites"), 3)
    result = run(grid, plan, tmp_path / "bad", model=miniature.model(plan))
    report = result.metrics["rounds"][0]
    assert list(report["sites"]) == ["oslo"] and subtracted == [2, 2]
    assert report["refused"]["lyon"] == "Expected a reply that can be read; MemoryError was raised."
    monkeypatch.undo()

    def alone(site: str, kind: str, reply: Any) -> Any:
        silent = (kind, site) in (("train", "lyon"), ("train", "turin"))
        return Refusal(kind=RefusalKind.INTERNAL, site=site) if silent else reply

    other = InProcessGrid(miniature.client(tmp_path / "alone" / "sites", tamper=alone), 3)
    expected = run(other, plan, tmp_path / "alone", model=miniature.model(plan)).shared
    assert all(torch.equal(result.shared[name], expected[name]) for name in expected)
