import copy
import math
import pickle
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.books.answers import KeptAnswers
from client.declared import GateRefusal
from client.release import Gate, Released
from federation.journal import Journal
from federation.wire.wire import RefusalKind, array_record, tensors_of
from meduet_models.weights import sha256_of_tensors
from privacy.chain import read_chain
from privacy.clipping import joint_norm
from privacy.ledger import AnsweredBefore, Ledger, Place, Reservation
from privacy.promise import Promise
from tests.worlds import unanswered_places

PLAN = "9f3c" * 16
ASKED = "a5" * 32
SHAPES = {"encoder.weight": (3, 4), "encoder.bias": (3,)}


class Door:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.journal = Journal(folder / "journal.jsonl")
        self.answers = KeptAnswers(folder / "answers")

    def gate(self, reservation: Reservation) -> Gate:
        return Gate(reservation, self.ledger, self.journal, self.answers)

    def reserve(self, bound: float = 1.0, enforcement: str = "clip", round_number: int = 1) -> Reservation:
        kind, unit = ("round", "site update") if enforcement == "clip" else ("survey", "patient statistics")
        promise = Promise(kind=kind, bound=bound, unit=unit, enforcement=enforcement)  # type: ignore[arg-type]
        place = Place(plan_sha256=PLAN, kind=kind, round=round_number)  # type: ignore[arg-type]
        return self.ledger.reserve(place, ASKED, promise)

    def lines(self) -> int:
        return self.journal.verify()


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def update(seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-4, 1e6),
    bound=st.floats(1e-3, 1e3),
    weight=st.integers(1, 5000),
    wire_dtype=st.sampled_from(["float32", "bfloat16", "mxint8"]),
)
def test_nothing_longer_than_examples_times_the_bound_leaves(
    tmp_path: Path, seed: int, scale: float, bound: float, weight: int, wire_dtype: str
) -> None:
    for name in ("ledger.jsonl", "journal.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
    door = Door(tmp_path)
    released = door.gate(door.reserve(bound)).release(
        update(seed, scale),
        SHAPES,
        weight=float(weight),
        wire_dtype=wire_dtype,  # type: ignore[arg-type]
    )
    assert joint_norm(released.tensors) <= weight * bound
    assert released.record["norm_after"] == joint_norm(released.tensors)


def test_a_short_update_leaves_as_examples_times_itself(door: Door) -> None:
    released = door.gate(door.reserve(bound=1e3)).release(
        update(), SHAPES, weight=20.0, counts={"examples": 20}
    )
    for name, tensor in update().items():
        assert torch.equal(released.tensors[name], tensor * 20)
    assert released.record["clipped"] is False
    assert released.counts == {"examples": 20}


@pytest.mark.parametrize(
    ("enforcement", "not_covered"),
    [("clip", frozenset[str]()), ("check", frozenset[str]()), ("check", frozenset({"encoder.bias"}))],
)
@pytest.mark.parametrize("bound", [1e-3, 1e6])
def test_what_was_handed_in_is_neither_changed_nor_what_leaves(
    door: Door, enforcement: str, not_covered: frozenset[str], bound: float
) -> None:
    handed = update() if enforcement == "clip" else update(scale=1e-6)
    before = {name: tensor.clone() for name, tensor in handed.items()}
    released = door.gate(door.reserve(bound, enforcement)).release(
        handed, SHAPES, weight=3.0, not_covered=not_covered
    )
    for name, tensor in handed.items():
        assert torch.equal(tensor, before[name])
        assert released.tensors[name].data_ptr() != tensor.data_ptr()
    assert released.record["sha256"] == sha256_of_tensors(released.tensors)


def test_what_leaves_in_bfloat16_is_what_the_wire_can_carry(door: Door) -> None:
    released = door.gate(door.reserve()).release(update(), SHAPES, weight=7.0, wire_dtype="bfloat16")
    for tensor in released.tensors.values():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.bfloat16().float())
    assert released.record["bytes"] == 15 * 2


def test_what_leaves_in_mxint8_is_hashed_as_it_will_be_read(door: Door) -> None:
    released = door.gate(door.reserve()).release(update(), SHAPES, weight=7.0, wire_dtype="mxint8")
    arrived = tensors_of(array_record(released.tensors, "mxint8"), "mxint8")
    assert sha256_of_tensors(arrived) == released.record["sha256"]
    assert released.record["bytes"] == 12 + 1 + 3 * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_inside(door: Door, bad: float) -> None:
    tensors = update()
    tensors["encoder.bias"][1] = bad
    with pytest.raises(GateRefusal) as refusal:
        door.gate(door.reserve()).release(tensors, SHAPES)
    assert refusal.value.kind is RefusalKind.NON_FINITE
    assert door.lines() == 0


def test_a_weight_that_overflows_the_sum_stays_inside(door: Door) -> None:
    tensors = {name: torch.full(shape, 1e38) for name, shape in SHAPES.items()}
    with pytest.raises(GateRefusal) as refusal:
        door.gate(door.reserve(bound=1e39)).release(tensors, SHAPES, weight=1000.0)
    assert refusal.value.kind is RefusalKind.NON_FINITE
    assert door.lines() == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.text(min_size=1).filter(lambda name: name not in SHAPES))
def test_a_tensor_that_was_not_declared_stays_inside(tmp_path: Path, extra: str) -> None:
    door = Door(tmp_path)
    with pytest.raises(GateRefusal, match="declared tensors only"):
        door.gate(door.reserve()).release({**update(), extra: torch.zeros(1)}, SHAPES)
    assert door.lines() == 0


def test_a_declared_tensor_that_is_missing_or_misshapen_or_whole_numbers_keeps_the_gate_shut(
    door: Door,
) -> None:
    for tensors, text in [
        ({"encoder.weight": update()["encoder.weight"]}, "is missing"),
        (update() | {"encoder.bias": torch.zeros(4)}, r"of shape \(3,\)"),
        (update() | {"encoder.bias": torch.zeros(3, dtype=torch.int64)}, "float32 or float64"),
    ]:
        with pytest.raises(GateRefusal, match=text):
            door.gate(door.reserve()).release(tensors, SHAPES)
    assert door.lines() == 0


@pytest.mark.parametrize(
    ("counts", "metrics", "text"),
    [
        ({"patients_named_smith": 3}, {}, "counts of the agreed names"),
        ({"examples": 3.5}, {}, "whole number"),
        ({"examples": True}, {}, "whole number"),
        ({"examples": -1}, {}, "whole number"),
        ({}, {"smallest_lesion_ml": 0.3}, "metrics of the agreed names"),
        ({}, {"loss.total": "low"}, "to be a float"),
        ({}, {"loss.total": math.nan}, "to be finite"),
    ],
)
def test_numbers_of_other_names_or_kinds_keep_the_gate_shut(
    door: Door, counts: dict[str, int], metrics: dict[str, float], text: str
) -> None:
    with pytest.raises(GateRefusal, match=text):
        door.gate(door.reserve()).release(update(), SHAPES, counts=counts, metrics=metrics)
    assert door.lines() == 0


def test_sums_that_are_longer_than_their_contributors_allow_stay_inside(door: Door) -> None:
    shapes = {"count": (1,), "mean": (4,)}
    sums = {"count": torch.tensor([3.0]), "mean": torch.full((4,), 3.0)}  # three contributors of norm 2
    covered = frozenset({"count"})
    fine = door.gate(door.reserve(2.0, "check")).release(sums, shapes, weight=3.0, not_covered=covered)
    assert torch.equal(fine.tensors["mean"], sums["mean"])
    assert fine.record["not_covered"] == ["count"]
    with pytest.raises(GateRefusal, match="not bounded where the sum was made"):
        door.gate(door.reserve(1.99, "check")).release(sums, shapes, weight=3.0, not_covered=covered)
    assert door.lines() == 1


def test_a_tensor_outside_the_bound_must_be_finite_all_the_same(door: Door) -> None:
    sums = {"count": torch.tensor([math.nan]), "mean": torch.zeros(4)}
    with pytest.raises(GateRefusal, match="finite"):
        door.gate(door.reserve(2.0, "check")).release(
            sums,
            {"count": (1,), "mean": (4,)},
            weight=3.0,
            not_covered=frozenset({"count"}),
        )


def test_a_number_that_only_the_wire_makes_infinite_stays_inside(door: Door) -> None:
    sums = {"count": torch.tensor([3.4e38]), "mean": torch.zeros(4)}
    with pytest.raises(GateRefusal, match="finite"):
        door.gate(door.reserve(2.0, "check")).release(
            sums,
            {"count": (1,), "mean": (4,)},
            weight=3.0,
            not_covered=frozenset({"count"}),
            wire_dtype="bfloat16",
        )


def test_with_a_place_in_another_ledger_nothing_leaves(door: Door, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="reserve before reading"):
        door.gate(Door(tmp_path / "elsewhere").reserve()).release(update(), SHAPES)
    assert door.lines() == 0


def test_the_journal_says_what_left_and_points_into_the_ledger(door: Door) -> None:
    released = door.gate(door.reserve(bound=0.5)).release(
        update(scale=10.0), SHAPES, weight=20.0, metrics={"loss.total": 1.5}
    )
    (line,) = door.journal.entries()
    assert line.record == dict(released.record)
    assert line.record["sha256"] == sha256_of_tensors(released.tensors)
    assert (line.record["round"], line.record["plan"]) == (1, PLAN)
    assert line.record["bytes"] == 15 * 4
    assert line.record["clipped"] is True
    assert line.record["norm_before"] == pytest.approx(joint_norm(update(scale=10.0)))
    assert line.record["norm_after"] == pytest.approx(0.5 * 20, rel=1e-5)
    assert line.record["metrics"] == {"loss.total": 1.5}
    assert "noise enters nowhere" in line.record["noise"]
    assert "epsilon is infinite" in line.record["promise"]
    assert door.ledger.verify(head=line.record["ledger"]) == 2
    assert unanswered_places(door.folder / "ledger.jsonl") == []


def test_when_the_journal_cannot_be_written_nothing_is_returned_though_it_was_charged(
    door: Door, tmp_path: Path
) -> None:
    door.gate(door.reserve()).release(update(), SHAPES)
    path = tmp_path / "journal.jsonl"
    path.write_text(path.read_text().replace('"round":1', '"round":2'))
    with pytest.raises(ValueError, match="line 1"):
        door.gate(door.reserve(round_number=2)).release(update(), SHAPES)
    assert unanswered_places(door.folder / "ledger.jsonl") == []


def test_only_the_gate_makes_a_released(door: Door) -> None:
    released = door.gate(door.reserve()).release(update(), SHAPES)
    fields = {name: getattr(released, name) for name in Released.__slots__}
    with pytest.raises(TypeError, match=r"Gate\.release"):
        Released(object(), **fields)
    for smuggle in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            smuggle(released)
    with pytest.raises(TypeError):
        released.tensors["more"] = torch.zeros(1)  # type: ignore[index]


def test_changing_the_weights_after_the_release_does_not_change_what_left(door: Door) -> None:
    tensors = {name: value for name, value in update().items()}
    released = door.gate(door.reserve(bound=1e6)).release(tensors, SHAPES)
    for tensor in tensors.values():
        tensor.zero_()
    assert sha256_of_tensors(released.tensors) == released.record["sha256"]


def test_the_same_question_gets_the_same_bytes_and_numbers_for_no_second_charge(door: Door) -> None:
    first = door.gate(door.reserve()).release(
        update(), SHAPES, weight=20.0, counts={"examples": 20}, metrics={"seconds": 1.5}
    )
    again = door.gate(door.reserve()).again()
    assert again is not None
    assert sha256_of_tensors(again.tensors) == sha256_of_tensors(first.tensors) == first.record["sha256"]
    assert (again.counts, again.metrics) == (first.counts, first.metrics)
    assert (again.promise, again.wire_dtype) == (first.promise, first.wire_dtype)
    one, other = (entry.record for entry in door.journal.entries())  # what left twice is written twice
    assert one == other == dict(again.record) and one["question"] == ASKED
    assert door.ledger.verify() == 2


def test_an_answer_that_is_no_longer_kept_leaves_again_only_if_it_is_the_same(
    door: Door, tmp_path: Path
) -> None:
    def release(seed: int, seconds: float) -> Released:
        return door.gate(door.reserve()).release(update(seed), SHAPES, metrics={"seconds": seconds})

    first = release(0, 1.5)
    (kept,) = tmp_path.rglob("round-0001.safetensors")
    assert kept.stat().st_mode & 0o777 == 0o600 and kept.parent.stat().st_mode & 0o077 == 0
    kept.unlink()
    assert door.gate(door.reserve()).again() is None
    same = release(0, 99.0)
    assert same.record == first.record  # beside the same tensors, the same numbers
    kept.write_bytes(b"damaged")
    assert door.gate(door.reserve()).again() is None
    called: list[int] = []
    with pytest.raises(AnsweredBefore, match="this one is another"):
        door.gate(door.reserve()).release(update(1), SHAPES, keep=lambda: called.append(1))
    assert not called and door.ledger.verify() == 2 and door.lines() == 2


@pytest.mark.parametrize("dies", ["keep", "answers", "ledger", "journal"])
def test_a_site_killed_anywhere_on_the_way_out_gives_the_same_answer_later_and_is_charged_once(
    door: Door, dies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as killing:
        for name, what in (("answers", "write"), ("ledger", "settle"), ("journal", "append")):
            if dies == name:
                killing.setattr(getattr(door, name), what, die)
        with pytest.raises(Killed):
            door.gate(door.reserve()).release(update(), SHAPES, keep=die if dies == "keep" else lambda: None)
    assert door.lines() == 0
    later = Door(tmp_path)
    found = later.gate(later.reserve()).again()
    assert (found is not None) == (dies == "journal")  # only then had it been charged
    answer = found or later.gate(later.reserve()).release(update(), SHAPES)
    assert torch.equal(
        answer.tensors["encoder.bias"],
        later.answers.read(answer_place(), answer.record["sha256"]).tensors["encoder.bias"],
    )  # type: ignore[union-attr]
    assert later.ledger.verify() == 2 and later.lines() == 1
    assert unanswered_places(tmp_path / "ledger.jsonl") == []


@pytest.mark.parametrize("dies", ["nowhere", "ledger", "keep", "answers", "journal"])
def test_an_answer_after_a_loss_is_the_same_one_ever_after_wherever_the_site_is_killed(
    door: Door, dies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    door.gate(door.reserve()).release(update(0), SHAPES)
    shutil.rmtree(tmp_path / "answers")
    states: list[int] = []  # the state after the round, kept before the books name the answer

    def lost(door: Door, keep: Callable[[], None] = lambda: states.append(1)) -> Released:
        found = door.gate(door.reserve()).again()
        return found or door.gate(door.reserve()).release(update(1), SHAPES, keep=keep, anew=not states)

    with monkeypatch.context() as killing:
        for name, what in (("answers", "write"), ("ledger", "settle"), ("journal", "append")):
            if dies == name:
                killing.setattr(getattr(door, name), what, die)
        with pytest.raises(Killed) if dies != "nowhere" else nullcontext():
            lost(door, die if dies == "keep" else lambda: states.append(1))
    answer = lost(Door(tmp_path))
    assert answer.record["sha256"] == lost(Door(tmp_path)).record["sha256"]
    events = [entry.record["event"] for entry in read_chain(tmp_path / "ledger.jsonl", "ledger")]
    assert events == ["reserve", "settle", "anew"]


def answer_place() -> Place:
    return Place(plan_sha256=PLAN, kind="round", round=1)


def test_the_answers_of_the_last_three_rounds_of_each_kind_are_kept(door: Door, tmp_path: Path) -> None:
    door.gate(door.reserve(1e6, "check", round_number=0)).release(update(), SHAPES)
    for round_number in range(1, 6):
        door.gate(door.reserve(round_number=round_number)).release(update(round_number), SHAPES)
    names = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert names == [f"round-000{n}.safetensors" for n in (3, 4, 5)] + ["survey-0000.safetensors"]


def test_a_disk_that_keeps_no_answer_costs_the_copy_and_not_the_round(
    door: Door, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "answers").write_text("in the way")
    door.gate(door.reserve()).release(update(), SHAPES)
    assert door.lines() == 1 and "could not be written" in caplog.text
