import math

import pytest
import torch
from flwr.app import MetricRecord

from federation.exchanges.pretraining import TrainReply
from federation.plan.plan import WireDtype
from federation.wire.limits import Largest, largest_reply, metric_range, promised
from federation.wire.messages import METRIC_NAMES, MessageError
from federation.wire.wire import array_record


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16", "mxint8"])
def test_the_largest_reply_is_as_large_as_what_is_sent_and_hardly_larger(wire_dtype: WireDtype) -> None:
    tensors = {"a": torch.randn(300, 70), "b": torch.randn(11), "c": torch.randn(2, 3).double()}
    sent = array_record(tensors, wire_dtype).count_bytes()
    largest = largest_reply(tensors, wire_dtype)
    assert sent <= largest.array_bytes < sent + 2048
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    alike = promised({n: s for n, s in shapes.items() if n != "c"}, torch.float32)
    assert largest_reply(alike | promised({"c": shapes["c"]}, torch.float64), wire_dtype) == largest


def test_a_reply_of_many_chunks_may_have_as_many_objects() -> None:
    assert Largest(array_bytes=1 << 30).num_objects > 1024
    assert Largest(array_bytes=100).num_objects == 64


@pytest.mark.parametrize("name", sorted(METRIC_NAMES))
def test_every_metric_has_a_largest_value_beyond_which_the_reply_is_refused(name: str) -> None:
    reply = TrainReply(plan_sha256="0" * 64, site="oslo", round=1, examples=1, update={})
    least, largest = metric_range(name)
    assert math.isfinite(least) and math.isfinite(largest)
    for value, fits in ((largest, True), (least, True), (1.7e308, False), (least - 1e10, False)):
        record = reply.to_record()
        record["metrics"] = MetricRecord({name: value})
        if fits:
            assert TrainReply.from_record(record).metrics == {name: value}
        else:
            with pytest.raises(MessageError, match=f"'{name}' from"):
                TrainReply.from_record(record)
