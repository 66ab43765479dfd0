import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.exchanges.erasure import ErasureAsk, ErasureReply
from federation.exchanges.pretraining import TrainAsk, TrainReply
from federation.exchanges.probes import ProbeAsk, ProbeReply
from federation.exchanges.survey import SurveyAsk, SurveyReply
from federation.wire.messages import MessageError, Refusal, RefusalKind, kind_of, plan_hash
from federation.wire.wire import array_record, num_bytes, rounded, tensors_of

HASH = "a" * 64
TENSORS = {"weight": torch.randn(3, 4), "scalar": torch.tensor(-0.0), "none": torch.zeros(0, 2)}
MOMENTS = {"sums": torch.randn(5, dtype=torch.float64)}
MESSAGES = [
    SurveyAsk(plan_json="{}"),
    SurveyReply(plan_sha256=HASH, site="oslo", moments=TENSORS, num_patients=11, num_scans=14),
    TrainAsk(plan_json="{}", round=1, shared=TENSORS, bank={}, home={"style": torch.ones(2)}),
    TrainAsk(plan_json="{}", round=2, shared={}, bank=TENSORS),
    TrainReply(
        plan_sha256=HASH, site="oslo", round=2, examples=7, update=TENSORS, metrics={"loss.total": 0.5}
    ),
    ErasureAsk(plan_json="{}", shared=TENSORS),
    ErasureReply(plan_sha256=HASH, site="oslo", moments=MOMENTS),
    Refusal(kind=RefusalKind.BUDGET, site="oslo"),
    ProbeAsk(plan_json="{}", round=3, shared=TENSORS, bank={}, probe=TENSORS),
    ProbeReply(plan_sha256=HASH, site="oslo", round=3, sums=MOMENTS),
]


def carried(record: RecordDict) -> RecordDict:
    """Through protobuf and back."""
    return recorddict_from_proto(recorddict_to_proto(record))


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return set(one) == set(other) and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        # bits, so that -0.0 is not 0.0
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.numpy().tobytes() == other.numpy().tobytes()
        )
    return bool(one == other)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_from_the_wire_as_it_was(message: Any) -> None:
    back = type(message).from_record(carried(message.to_record()))
    for field in dataclasses.fields(message):
        assert alike(getattr(message, field.name), getattr(back, field.name)), field.name


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_nothing_may_be_missing_added_or_of_another_version(message: Any) -> None:
    def read(change: Any) -> None:
        record = message.to_record()
        change(record)
        type(message).from_record(record)

    head = "head"
    for key in list(message.to_record()[head]):
        with pytest.raises(MessageError):
            read(lambda record, key=key: record[head].pop(key))
    for name in message.to_record():
        if name != "home":
            with pytest.raises(MessageError):
                read(lambda record, name=name: record.pop(name))
    with pytest.raises(MessageError, match="'stray'"):
        read(lambda record: record.__setitem__("stray", ConfigRecord({})))
    with pytest.raises(MessageError, match="'stray'"):
        read(lambda record: record[head].__setitem__("stray", 1))
    with pytest.raises(MessageError, match="wire version 2; got 99") as error:
        read(lambda record: record[head].__setitem__("wire_version", 99))
    assert error.value.kind is RefusalKind.WRONG_VERSION
    with pytest.raises(MessageError, match="got 'other'"):
        read(lambda record: record[head].__setitem__("kind", "other"))


def test_a_plan_that_does_not_hash_to_what_is_said_is_refused() -> None:
    record = SurveyAsk(plan_json='{"seed":1}').to_record()
    record.config_records["head"]["plan_json"] = '{"seed":2}'
    with pytest.raises(MessageError, match=plan_hash('{"seed":2}')[:12]):
        SurveyAsk.from_record(record)


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)])
def test_counts_and_flags_do_not_travel(tensor: torch.Tensor) -> None:
    with pytest.raises(MessageError, match="float32 or float64"):
        array_record({"steps": tensor})


def _told(index: object, **rows: Any) -> RecordDict:
    """A reply with these arrays."""
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    record = MESSAGES[4].to_record()
    arrays = {kind: row if isinstance(row, Array) else Array(row) for kind, row in rows.items()}
    record["update"] = ArrayRecord({"index": Array(np.frombuffer(text, dtype=np.uint8)), **arrays})
    return record


ROW = np.ones(3, dtype=np.float32)
WEIGHT = ["weight", "float32", [3]]


def test_a_reply_made_by_hand_is_read() -> None:
    update = TrainReply.from_record(_told([WEIGHT], float32=ROW)).update
    assert torch.equal(update["weight"], torch.ones(3))


@pytest.mark.parametrize(
    "record",
    [
        _told([WEIGHT], float32=ROW.astype(np.int64)),
        _told([["weight", "bfloat16", [3]]], bfloat16=np.ones(3, dtype=np.uint16)),
        _told([WEIGHT], float32=np.ones((3, 1), dtype=np.float32)),
        _told([WEIGHT], float32=Array("float32", (3,), "numpy.ndarray", Array(ROW).data[:-1])),
        _told([WEIGHT], float32=Array("float32", (300,), "numpy.ndarray", Array(ROW).data)),
        _told([WEIGHT], float32=Array("float32", (3,), "numpy.ndarray", b"no array at all")),
        _told([WEIGHT], float32=Array("float32", (3,), "pickle", b"cbuiltins\neval\n.")),
        _told([["weight", "float32", [2]]], float32=ROW),
        _told([["weight", "float32", [4]]], float32=ROW),
        _told([["weight", "float32", [-3]]], float32=ROW),
        _told([["weight", "float32", [True, 3]]], float32=ROW),
        _told([["weight", "float32", [1 << 60, 1 << 60]]], float32=ROW),
        _told([WEIGHT, WEIGHT], float32=np.ones(6, dtype=np.float32)),
        _told([WEIGHT], float32=ROW, float64=np.ones(1)),
        _told([["weight", "float16", [3]]], float16=ROW),
        _told([], float32=ROW),
        _told({"weight": 3}, float32=ROW),
        _told(b"not JSON", float32=ROW),
        _told(b"[" * 100_000, float32=ROW),
        _told(b"\xff\xfe", float32=ROW),
    ],
    ids=[
        *(
            "int64",
            "bfloat16 unsaid",
            "not a row",
            "cut",
            "shape",
            "foreign",
            "pickle",
            "too many",
            "too few",
        ),
        *("negative", "boolean", "endless", "twice", "unasked", "unknown type", "not in the index"),
        *("no list", "no JSON", "too deep", "no text"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(record: RecordDict) -> None:
    with pytest.raises(MessageError):
        TrainReply.from_record(record)


def test_arrays_without_an_index_are_refused() -> None:
    record = MESSAGES[4].to_record()
    record["update"] = ArrayRecord({"float32": Array(ROW)})
    with pytest.raises(MessageError, match="Expected an array 'index'"):
        TrainReply.from_record(record)


def test_a_model_is_a_few_arrays_and_comes_back_whole() -> None:
    tensors = {f"layer {n}": torch.randn(n % 4, 5) for n in range(80)} | {
        "scalar": torch.tensor(2.5),
        "sum": torch.randn(3, dtype=torch.float64),
    }
    record = array_record(tensors)
    assert set(record) == {"index", "float32", "float64"}
    for copy in (True, False):
        back = tensors_of(record, copy=copy)
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    assert tensors_of(array_record({})) == {}


@pytest.mark.parametrize("metrics", [{"patient_age": 1.0}, {"loss.total": float("nan")}, {"seconds": 3}])
def test_a_metric_is_a_finite_float_of_an_agreed_name(metrics: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match="metric"):
        dataclasses.replace(MESSAGES[4], metrics=metrics).to_record()
    record = MESSAGES[4].to_record()
    record["metrics"] = MetricRecord(metrics)
    with pytest.raises(MessageError, match="metric"):
        TrainReply.from_record(record)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=20),
    st.integers(1, 10**6),
)
def test_bfloat16_keeps_the_relative_precision_of_the_weighted_update(
    values: list[float], examples: int
) -> None:
    update = {"weight": torch.tensor(values) * examples}
    reply = TrainReply(
        plan_sha256=HASH, site="oslo", round=1, examples=examples, update=update, wire_dtype="bfloat16"
    )
    record = carried(reply.to_record())
    assert record.array_records["update"]["bfloat16"].dtype == "uint16"
    back = TrainReply.from_record(record, copy=False).update["weight"]
    assert back.dtype == torch.float32
    assert ((back - update["weight"]).abs() <= update["weight"].abs() * 2**-8).all()


def test_in_mxint8_matrices_take_a_byte_per_value_and_vectors_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(40, 33, generator=generator),
        "gain": 1 + 1e-4 * torch.randn(33, generator=generator),
        "empty": torch.zeros(0, 4),
        "kernel": 1e-3 * torch.randn(8, 2, 3, generator=generator),
        "sum": torch.randn(5, dtype=torch.float64, generator=generator),
    }
    record = array_record(tensors, "mxint8")
    assert set(record) == {"index", "mxint8", "mxint8_exponents", "float32", "float64"}
    back = tensors_of(record, "mxint8")
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], rounded(tensor, "mxint8"))
        assert torch.equal(back[name], tensor) == (name in ("gain", "sum", "empty"))
        assert float((back[name] - tensor).norm()) <= 0.011 * float(tensor.norm())
    assert num_bytes(tensors, "mxint8") == 40 * 33 + 42 + 33 * 4 + 48 + 2 + 5 * 8
    again = tensors_of(array_record(back, "mxint8"), "mxint8")
    assert all(torch.equal(again[name], tensor) for name, tensor in back.items())


MATRIX = {"mxint8": np.ones(3, dtype=np.int8), "mxint8_exponents": np.full(1, 127, dtype=np.uint8)}


@pytest.mark.parametrize(
    ("index", "rows", "said", "why"),
    [
        ([["weight", "mxint8", [3]]], MATRIX, "mxint8", "'weight' as float32"),
        ([["weight", "mxint8", [1, 3]]], MATRIX, "bfloat16", "'weight' as bfloat16"),
        ([["weight", "float32", [1, 3]]], {"float32": ROW}, "mxint8", "'weight' as mxint8"),
        ([["weight", "mxint8", [1, 3]]], {"mxint8": MATRIX["mxint8"]}, "mxint8", "'mxint8_exponents'"),
        (
            [["weight", "mxint8", [1, 3]]],
            MATRIX | {"mxint8_exponents": np.full(2, 127, dtype=np.uint8)},
            "mxint8",
            "Expected 1 values as mxint8_exponents",
        ),
        ([["weight", "mxint8_exponents", [1, 3]]], MATRIX, "mxint8", "an index of"),
    ],
)
def test_mxint8_that_is_not_what_it_says_is_refused(index: Any, rows: Any, said: str, why: str) -> None:
    record = _told(index, **rows)
    record.config_records["head"]["wire_dtype"] = said
    with pytest.raises(MessageError, match=why):
        TrainReply.from_record(record)


def test_mxint8_made_by_hand_is_read() -> None:
    record = _told([["weight", "mxint8", [1, 3]]], **MATRIX)
    record.config_records["head"]["wire_dtype"] = "mxint8"
    assert torch.equal(TrainReply.from_record(record).update["weight"], torch.full((1, 3), 1 / 64))


def test_without_copy_the_tensors_are_the_received_bytes() -> None:
    record = array_record({"weight": torch.arange(4.0)})
    copied, viewed = tensors_of(record)["weight"], tensors_of(record, copy=False)["weight"]
    received = record["float32"].data
    start = np.frombuffer(received, dtype=np.uint8).ctypes.data
    assert start <= viewed.data_ptr() < start + len(received)
    assert not start <= copied.data_ptr() < start + len(received)
    assert torch.equal(copied, viewed)


def test_a_record_says_what_it_is() -> None:
    assert kind_of(MESSAGES[4].to_record()) == "train_reply"
    with pytest.raises(MessageError, match="'head'"):
        kind_of(RecordDict({"arrays": ArrayRecord()}))


def test_a_refusal_of_an_unknown_kind_is_not_a_refusal() -> None:
    record = MESSAGES[7].to_record()
    record.config_records["head"]["reason"] = "patient 1234 has moved"
    with pytest.raises(MessageError, match="known kind"):
        Refusal.from_record(record)
