"""Probes fitted by exchanges: sums of sites give the pooled probe, to rounding."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from meduet_models.probe_steps import (
    Ask,
    MlpShape,
    StepSums,
    fit_logistic,
    fit_mlp,
    logistic_sums,
    mlp_sums,
    over_sites,
)

SIZES = (30, 45, 60)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patients(spread: bool = False) -> list[Tensor]:
    """Patients of three sites that differ in their means, or in their spread alone."""
    if spread:
        return [(0.2, 1.0, 4.0)[s] * drawn(n, 4, seed=s) for s, n in enumerate(SIZES)]
    return [drawn(n, 4, seed=s) + drawn(4, seed=10 + s) for s, n in enumerate(SIZES)]


def pooled_logistic(x: list[Tensor]) -> Ask:
    """Everybody's sums, computed in one place, row by row in another order."""

    def ask(parameters: Tensor) -> StepSums:
        rows = [(s, row) for s, own in enumerate(x) for row in own]
        parts = [logistic_sums(row[None], s, 3, 1 / SIZES[s], parameters) for s, row in reversed(rows)]
        return sum(parts[1:], start=parts[0])

    return ask


def test_newton_on_sums_of_sites_gives_the_pooled_logistic_regression() -> None:
    x = patients()
    answers: list[Ask] = [partial(logistic_sums, own, s, 3, 1 / SIZES[s]) for s, own in enumerate(x)]
    federated = fit_logistic(over_sites(answers), 4, 3, penalty=0.05)
    torch.testing.assert_close(federated, fit_logistic(pooled_logistic(x), 4, 3, 0.05), rtol=1e-8, atol=1e-8)
    labels = np.repeat(np.arange(3), SIZES)
    weights = 1 / np.asarray(SIZES)[labels]
    known = LogisticRegression(C=1 / 0.05, tol=1e-12, max_iter=10_000)
    known.fit(torch.cat(x).numpy(), labels, sample_weight=weights)
    ours = (federated[:-1] - federated[:-1].mean(1, keepdim=True)).T.numpy()
    np.testing.assert_allclose(ours, known.coef_, atol=1e-3)


def test_gradient_and_curvature_are_those_of_the_loss_and_within_their_bounds() -> None:
    x, at = patients()[1][:1], drawn(15, seed=3)
    sums = logistic_sums(x, 1, 3, 1.0, at)
    loss = lambda p: logistic_sums(x, 1, 3, 1.0, p).loss  # noqa: E731
    torch.testing.assert_close(sums.gradient, torch.autograd.functional.jacobian(loss, at))
    torch.testing.assert_close(sums.curvature, torch.autograd.functional.hessian(loss, at))
    longest = float(x.square().sum()) + 1
    assert sums.curvature is not None
    assert float(sums.gradient.norm()) <= (2 * longest) ** 0.5
    assert float(sums.curvature.norm()) <= longest / 2


def test_full_batch_steps_on_sums_of_sites_give_the_pooled_mlp_which_sees_what_no_line_does() -> None:
    x, shape = patients(spread=True), MlpShape(num_features=4, num_sites=3)

    def answer(own: Tensor, site: int) -> Ask:
        return partial(mlp_sums, own, site, shape, 1 / SIZES[site], 5.0)

    federated = fit_mlp(over_sites([answer(own, s) for s, own in enumerate(x)]), shape, seed=1)
    halves = [answer(part, s) for s, own in enumerate(x) for part in (own[7:], own[:7])]
    pooled = fit_mlp(over_sites(halves[::-1]), shape, seed=1)
    torch.testing.assert_close(federated, pooled, rtol=1e-8, atol=1e-8)
    unseen = [(0.2, 1.0, 4.0)[s] * drawn(200, 4, seed=20 + s) for s in range(3)]
    recall = [(shape.logits(own, federated).argmax(1) == s).double().mean() for s, own in enumerate(unseen)]
    lines: list[Ask] = [partial(logistic_sums, own, s, 3, 1 / SIZES[s]) for s, own in enumerate(x)]
    line = fit_logistic(over_sites(lines), 4, 3)
    flat = [((own @ line[:-1] + line[-1]).argmax(1) == s).double().mean() for s, own in enumerate(unseen)]
    assert sum(recall) / 3 > sum(flat) / 3 + 0.2


def test_one_patients_gradient_is_never_longer_than_the_bound() -> None:
    shape = MlpShape(num_features=4, num_sites=3)
    far = 1e3 * drawn(1, 4)
    sums = mlp_sums(far, 0, shape, 1.0, 0.01, shape.start(0))
    assert float(sums.gradient.norm()) <= 0.01 * (1 + 1e-12)


def test_sums_with_and_without_curvature_do_not_add_and_newton_wants_it() -> None:
    nothing = torch.zeros((), dtype=torch.float64)
    with_it, without = (
        StepSums(nothing, torch.zeros(2).double(), torch.eye(2).double()),
        StepSums(nothing, torch.zeros(2).double()),
    )
    with pytest.raises(ValueError, match="curvature of both"):
        with_it + without
    with pytest.raises(ValueError, match="with curvature"):
        fit_logistic(lambda at: StepSums(nothing, torch.zeros_like(at)), 1, 2)
