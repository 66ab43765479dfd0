import itertools
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies import robust
from strategies.aggregation import Bounds, ReplyRefused
from strategies.robust import SpilledReplies, bad_sites, krum, median, trimmed_mean

Rule = Literal["trimmed_mean", "median", "krum"]
REFERENCE = {"a": torch.zeros(3, 5), "b": torch.zeros(40)}
BOUNDS = Bounds(num_replies=5, max_norm=1000.0)


def replies(num: int = 5) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"site {i}": {n: torch.randn(t.shape, generator=generator) for n, t in REFERENCE.items()}
        for i in range(num)
    }


def result(
    folder: Path, rule: Rule, order: list[str], replies: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    spilled = SpilledReplies(REFERENCE, BOUNDS, folder / "spill", rule, trim=0.2)
    for site in order:
        examples = 1 + len(site)
        spilled.fold(site, {n: t * examples for n, t in replies[site].items()}, examples)
    assert not list(folder.glob("*.npy"))
    return spilled.mean()


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum"])
def test_the_order_of_arrival_has_no_influence(
    tmp_path: Path, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "_PIECE", 7)  # several pieces per tensor
    sent = replies()
    first = result(tmp_path, rule, list(sent), sent)
    for order in itertools.islice(itertools.permutations(sent), 1, None, 31):
        other = result(tmp_path, rule, list(order), sent)
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum"])
def test_one_hostile_site_of_five_cannot_move_the_result_beyond_the_others(
    tmp_path: Path, rule: Rule
) -> None:
    sent = replies()
    sent["site 2"] = {name: torch.full_like(t, 50.0) for name, t in REFERENCE.items()}
    mean = result(tmp_path, rule, list(sent), sent)
    honest = [sent[site] for site in sent if site != "site 2"]
    for name in REFERENCE:
        values = torch.stack([update[name] for update in honest])
        assert (mean[name] >= values.amin(0) - 1e-6).all() and (mean[name] <= values.amax(0) + 1e-6).all()


def test_a_trimmed_mean_and_a_median_are_numpys() -> None:
    values = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    ordered = np.sort(values.numpy(), axis=0)
    assert torch.allclose(trimmed_mean(values, 1), torch.from_numpy(ordered[1:5].mean(0)), atol=1e-6)
    assert torch.allclose(median(values), torch.from_numpy(np.median(values.numpy(), axis=0)), atol=1e-6)
    assert torch.equal(median(values[:5]), values[:5].median(dim=0).values)


def test_krum_takes_the_reply_whose_neighbours_are_nearest() -> None:
    points = torch.tensor([0.0, 0.9, 1.0, 1.1, 40.0], dtype=torch.float64)
    squared = (points[:, None] - points[None]).square()
    assert krum(squared, bad=1) == 2  # by hand: scores .81+1, .81+.01+..., the middle of the cluster wins


def test_krums_result_is_one_of_the_replies(tmp_path: Path) -> None:
    sent = replies()
    mean = result(tmp_path, "krum", list(sent), sent)
    assert any(torch.allclose(mean["b"], update["b"], atol=1e-5) for update in sent.values())


def test_files_are_gone_afterwards_and_those_of_an_interrupted_round_are_not_read(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    (spill / "0.float32").write_bytes(b"left over")
    sent = replies()
    with_rest = result(tmp_path, "median", list(sent), sent)
    assert not spill.exists()
    without = result(tmp_path, "median", list(sent), sent)
    assert all(torch.equal(with_rest[name], without[name]) for name in without)


def test_a_bad_reply_is_refused_before_it_is_written(tmp_path: Path) -> None:
    spilled = SpilledReplies(REFERENCE, BOUNDS, tmp_path / "spill", "median", 0.2)
    with pytest.raises(ReplyRefused, match="finite"):
        spilled.fold("site", {"a": torch.full((3, 5), torch.nan), "b": torch.zeros(40)}, 1)
    assert not list((tmp_path / "spill").iterdir())


@pytest.mark.parametrize(
    ("rule", "trim", "num"), [("krum", 0.2, 2), ("krum", 0.4, 6), ("trimmed_mean", 0.5, 4)]
)
def test_a_rule_without_enough_replies_is_refused_at_the_start(
    tmp_path: Path, rule: Rule, trim: float, num: int
) -> None:
    with pytest.raises(ReplyRefused, match="Expected"):
        SpilledReplies(REFERENCE, Bounds(num_replies=num, max_norm=1.0), tmp_path / "spill", rule, trim)


def test_bad_sites_are_rounded_down_but_not_by_a_floating_point_hair() -> None:
    assert [bad_sites(0.2, n) for n in (3, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]
    assert bad_sites(0.3, 10) == 3  # 0.3 · 10 is 3.0000000000000004 or 2.9999999999999996


def test_an_outlier_is_left_out_before_the_rule(tmp_path: Path) -> None:
    sent = replies(4)
    spilled = SpilledReplies(REFERENCE, BOUNDS, tmp_path / "spill", "median", trim=0.2)
    for site, tensors in sent.items():
        size = 50.0 if site == "site 2" else 1.0
        spilled.fold(site, {name: size * tensor for name, tensor in tensors.items()}, 1)
    assert list(spilled.screen(5.0)) == ["site 2"]
    others = [sent[f"site {i}"]["a"] for i in (0, 1, 3)]
    assert torch.equal(spilled.mean()["a"], torch.stack(others).median(dim=0).values)
