import itertools
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies import aggregation
from strategies.aggregation import Bounds, ReplyRefused, StreamingSum, outliers

REFERENCE = {"matrix": torch.zeros(5, 7), "vector": torch.zeros(140_001), "scalar": torch.zeros(())}
BOUNDS = Bounds(num_replies=6, max_norm=10_000.0)


def update(seed: int, size: float = 1e-2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) * size for name, tensor in REFERENCE.items()}


def folded(order: tuple[int, ...], threads: int = 1, size: float = 1e-2) -> StreamingSum:
    total = StreamingSum(REFERENCE, BOUNDS, threads)
    for seed in order:
        total.fold(f"site {seed}", update(seed, size * 10**seed), examples=seed + 1)
    return total


def bits(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


# sizes: all blocks in int32; some replies push blocks to int64; all in int64
@pytest.mark.parametrize("size", [1e-3, 3e-2, 1e-1])
def test_the_mean_is_the_same_bits_in_every_order_and_on_any_number_of_threads(size: float) -> None:
    first = bits(folded((0, 1, 2, 3), size=size).mean())
    for order in itertools.islice(itertools.permutations(range(4)), 1, None, 5):
        assert bits(folded(order, size=size).mean()) == first
    assert bits(folded((2, 0, 3, 1), threads=3, size=size).mean()) == first


def test_the_mean_is_that_of_exact_arithmetic_to_the_grid() -> None:
    total = folded((0, 1, 2, 3))
    for name, mean in total.mean().items():
        exact = sum(update(s, 1e-2 * 10**s)[name].double() for s in range(4)) / 10
        grid = 4 * 0.5 * 2.0**-BOUNDS.grid_bits / 10
        assert ((mean.double() - exact).abs() <= grid + exact.abs() * 2**-23).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=6), st.randoms())
def test_any_values_sum_to_the_same_bits_in_any_order(values: list[float], random: "object") -> None:
    replies = [({"scalar": torch.tensor(value)}, index + 1) for index, value in enumerate(values)]
    shuffled = replies.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    means = []
    for order in (replies, shuffled):
        total = StreamingSum({"scalar": torch.zeros(())}, Bounds(num_replies=6, max_norm=100.0))
        for tensors, examples in order:
            total.fold("site", tensors, examples)
        means.append(bits(total.mean()))
    assert means[0] == means[1]


def bad(**tensors: Tensor) -> dict[str, Tensor]:
    return {**update(9), **tensors}


def one_bad_value(value: float) -> Tensor:
    vector = update(9)["vector"]
    vector[-1] = value  # in the last of several blocks
    return vector


REFUSED = {
    "missing": {name: tensor for name, tensor in update(9).items() if name != "scalar"},
    "no tensor 'extra'": bad(extra=torch.zeros(1)),
    "shape": bad(matrix=torch.zeros(1)),
    "of shape": bad(matrix=torch.zeros(7, 5)),
    "got (1,)": bad(scalar=torch.zeros(1)),
    "float32": bad(matrix=torch.zeros(5, 7, dtype=torch.float64)),
    "finite": bad(vector=one_bad_value(math.nan)),
    "NaN or infinity": bad(vector=one_bad_value(-math.inf)),
    "L2 norm": bad(vector=one_bad_value(4.0e6)),
    "norm": bad(vector=one_bad_value(3e38)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("place", [0, 1])
def test_a_refused_reply_leaves_no_trace(reason: str, place: int, threads: int) -> None:
    total = StreamingSum(REFERENCE, BOUNDS, threads)
    for step in range(3):
        if step == place:
            with pytest.raises(ReplyRefused) as error:
                total.fold("bad", REFUSED[reason], examples=3)
            assert reason in str(error.value) and "\n" not in str(error.value)
        total.fold("good", update(step, 1e-2 * 10**step), examples=step + 1)
    assert total.num_replies == 3
    assert bits(total.mean()) == bits(folded((0, 1, 2)).mean())


@pytest.mark.parametrize("examples", [0, -1, 2**20 + 1, 1.5, True])
def test_a_weight_out_of_range_is_refused(examples: int) -> None:
    total = StreamingSum(REFERENCE, BOUNDS)
    with pytest.raises(Exception, match="examples"):  # beartype sees 1.5 first
        total.fold("site", update(0), examples)


def test_the_largest_replies_allowed_do_not_overflow() -> None:
    bounds = Bounds(num_replies=32, max_norm=100.0)
    total = StreamingSum({"value": torch.zeros(1)}, bounds)
    for _ in range(32):
        total.fold("site", {"value": torch.tensor([100.0 * bounds.max_examples])}, bounds.max_examples)
    assert total.mean()["value"].item() == 100.0


def test_bounds_that_leave_too_coarse_a_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="update_clip_norm"):
        StreamingSum(REFERENCE, Bounds(num_replies=32, max_norm=1e9))


def test_after_a_mean_or_a_reset_a_new_sum_begins_and_old_means_keep_their_bits() -> None:
    total = folded((0, 1, 2))
    before = total.mean()
    kept = bits(before)
    with pytest.raises(ReplyRefused, match="got none"):
        total.mean()
    fresh = StreamingSum(REFERENCE, BOUNDS)
    fresh.fold("site", update(3), 1)
    alone = bits(fresh.mean())
    total.fold("site", update(3), 1)
    total.reset()  # a round that failed
    for _ in range(2):
        total.fold("site", update(3), 1)
        assert bits(total.mean()) == alone
    assert bits(before) == kept


def test_memory_does_not_grow_with_the_number_of_replies() -> None:
    reference = {"weight": torch.zeros(1_000_000)}
    values = np.full(1_000_000, 1e-3, dtype=np.float32)

    def peak(num: int) -> int:
        tracemalloc.start()  # numpy tells it what it allocates; the replies are one array, made before
        total = StreamingSum(reference, Bounds(num_replies=num, max_norm=100.0))
        for _ in range(num):
            total.fold("site", {"weight": torch.from_numpy(values)}, 1)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(16) < 1.05 * peak(2)
    assert peak(16) < 4 * 1_000_000 + 16 * aggregation._BLOCK


def test_an_update_far_longer_than_the_rounds_others_is_taken_out_to_the_last_bit(tmp_path: Path) -> None:
    total = StreamingSum(REFERENCE, BOUNDS, 1, tmp_path / "spill")
    for seed in (0, 1, 2, 3):
        total.fold(f"site {seed}", update(seed, 1.0 if seed == 1 else 1e-2), examples=seed + 1)
    found = total.screen(5.0)
    assert list(found) == ["site 1"]
    assert "5 times the round's median" in found["site 1"]
    without = StreamingSum(REFERENCE, BOUNDS)
    for seed in (3, 0, 2):
        without.fold(f"site {seed}", update(seed), examples=seed + 1)
    assert bits(total.mean()) == bits(without.mean())
    assert not (tmp_path / "spill").exists()


def test_nobody_is_an_outlier_of_two_or_of_replies_of_one_size(tmp_path: Path) -> None:
    assert outliers({"a": 1.0, "b": 1000.0}, 5.0) == {}
    assert outliers({"a": 1.0, "b": 4.9, "c": 1.0}, 5.0) == {}
    assert outliers({"a": 0.0, "b": 0.0, "c": 1.0}, 5.0) == {}
    assert outliers({"a": 1.0, "b": 1000.0, "c": 1.0}, 0.0) == {}
    assert list(outliers({"a": 1.0, "b": 5.1, "c": 1.0, "d": 900.0}, 5.0)) == ["b", "d"]
    total = StreamingSum(REFERENCE, BOUNDS, 1, tmp_path / "spill")
    for seed in (0, 1, 2):
        total.fold(f"site {seed}", update(seed), examples=1)
    assert total.screen(5.0) == {}
    assert total.num_replies == 3
