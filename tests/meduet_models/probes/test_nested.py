import time
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from meduet_models.probes.nested import (
    LOGISTIC_PENALTIES,
    logistic_scores,
    nested_site_probe,
    permuted_sites,
    token_features,
)

PATIENTS = [f"p{i}" for i in range(40)] * 3
SITES = [s for s in range(3) for _ in range(40)]
PROBES: Any = ["linear", "mlp"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("probe", PROBES)
def test_a_planted_site_is_read_beyond_its_null_and_an_absent_one_is_within_it(probe: Any) -> None:
    anatomy = drawn(40, 12).repeat(3, 1) + 0.3 * drawn(120, 12, seed=1)
    planted = 2.0 * drawn(3, 12, seed=2)[torch.tensor(SITES)]
    there = nested_site_probe(anatomy + planted, SITES, PATIENTS, 0, probe, permutations=9)
    assert there.score > 0.9 > 0.5 > there.null_95
    assert there.p_value == pytest.approx(0.1)
    absent = nested_site_probe(anatomy, SITES, PATIENTS, 0, probe, permutations=9)
    assert absent.p_value > 0.1  # equals the best of ten labellings by chance once in ten; seeds are fixed
    assert absent.score < absent.chance + 0.16 and absent.chance == pytest.approx(1 / 3)


def test_a_site_that_changes_the_spread_alone_is_read_by_the_mlp_alone() -> None:
    spread = torch.tensor([0.2, 1.0, 4.0]).repeat_interleave(60)[:, None]
    sites, patients = [s for s in range(3) for _ in range(60)], [str(i) for i in range(180)]
    x = spread * drawn(180, 6, seed=7)
    linear, mlp = (nested_site_probe(x, sites, patients, 0, p, permutations=3) for p in PROBES)
    assert mlp.score > linear.score + 0.15  # .20 on two kinds of processor


def test_a_site_in_the_spread_over_tokens_is_read_from_mean_and_deviation_and_not_from_the_mean() -> None:
    spread = torch.tensor([0.7, 1.0, 1.4]).repeat_interleave(40)[:, None, None]
    tokens = spread * drawn(120, 24, 6, seed=8)
    tokens = tokens - tokens.mean(1, keepdim=True) + drawn(120, 1, 6, seed=9)
    patients = [str(i) for i in range(120)]
    mean, both = (
        nested_site_probe(token_features(tokens, kind), SITES, patients, 0, permutations=9)
        for kind in ("mean", "deviation")
    )
    assert both.score > 0.9 and mean.score < 1 / 3 + 0.16
    assert token_features(tokens, "tokens").shape == (120, 144)


def test_under_the_null_p_values_are_not_too_small_too_often() -> None:
    patients = [str(i) for i in range(45)]
    p_values = [
        nested_site_probe(
            drawn(45, 5, seed=s), [i % 3 for i in range(45)], patients, s, permutations=9
        ).p_value
        for s in range(20)
    ]
    assert sum(p <= 0.1 for p in p_values) <= 6  # of 20 at 0.1 each: 7 or more once in 420


def test_paired_patients_permute_within_themselves_and_others_exchange_whole() -> None:
    labels = np.array([0, 1, 2, 0, 0, 1, 1, 2, 2])
    patients = ["a", "a", "a", "b", "b", "c", "c", "d", "d"]
    drawn_labels = permuted_sites(labels, patients, 50, seed=0)
    assert (drawn_labels[0] == labels).all()
    assert all(sorted(row[:3]) == [0, 1, 2] for row in drawn_labels)
    for row in drawn_labels:
        assert row[3] == row[4] and row[5] == row[6] and row[7] == row[8]
        assert sorted(row[[3, 5, 7]]) == [0, 1, 2]
    assert len({tuple(row) for row in drawn_labels}) > 10


def test_the_logistic_regression_is_the_one_of_scikit_learn() -> None:
    x = drawn(80, 5, seed=3).double().numpy()
    x -= x.mean(0)
    x = np.linalg.svd(x, full_matrices=False)[0] * np.sqrt(16)  # orthogonal, centred columns
    y = (x[:, 0] + 0.5 * drawn(80, seed=4).numpy() > 0).astype(int) + (x[:, 1] > 0.4)
    unseen = drawn(30, 5, seed=5).double().numpy()
    scores = logistic_scores(x, unseen, torch.from_numpy(y)[None], 3, steps=500)
    for place, penalty in enumerate(LOGISTIC_PENALTIES[:3]):
        fitted = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
        expected = fitted.decision_function(unseen)
        got = scores[place, 0].numpy()
        np.testing.assert_allclose(
            got - got.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=2e-3
        )


def test_all_tokens_of_150_scans_take_seconds() -> None:
    tokens = drawn(152, 96, 96)
    start = time.process_time()
    nested_site_probe(
        token_features(tokens, "tokens"), [i % 4 for i in range(152)], [str(i // 4) for i in range(152)], 0
    )
    assert time.process_time() - start < 20  # some 3 on an idle machine


def test_a_reading_is_a_function_of_its_seed_and_leaves_the_global_draw_alone() -> None:
    before = torch.get_rng_state()
    first, same = (nested_site_probe(drawn(120, 4), SITES, PATIENTS, 3, "mlp", 2) for _ in range(2))
    assert first == same and torch.equal(before, torch.get_rng_state())


def test_scans_of_one_site_cannot_be_probed() -> None:
    with pytest.raises(ValueError, match="two sites"):
        nested_site_probe(drawn(6, 2), [1] * 6, list("abcdef"), 0)
