"""Ridge and logistic regression in closed form: laws, and what they recover."""

import pytest
import torch
from torch import Tensor

from meduet_models.erasure import ErasureMoments
from meduet_models.probes.cross_validation import patient_folds
from meduet_models.probes.ridge import fit_logistic, fit_ridge, ridge_from_sums


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names(count: int) -> list[str]:
    """One patient for each row."""
    return [f"p{i:03}" for i in range(count)]


def test_ridge_recovers_a_planted_linear_map() -> None:
    x, weight = drawn(0, 60, 5), drawn(1, 5, 2)
    y = x @ weight + 3.0
    fitted = fit_ridge(x, y, names(60))
    unseen = drawn(2, 20, 5)
    error = (fitted(unseen) - (unseen @ weight + 3.0)).square().mean() / y.var()
    assert float(error) < 1e-5
    assert float(fitted.alpha.max()) == 1e-4


def test_ridge_on_noise_chooses_to_predict_the_mean() -> None:
    x, y = drawn(0, 40, 200), drawn(1, 40, 1)
    fitted = fit_ridge(x, y, names(40))
    assert float(fitted.alpha.min()) >= 1.0
    assert float((fitted(x) - y.mean()).square().mean()) < 0.05 * float(y.var())


@pytest.mark.parametrize("width", [4, 50])
def test_ridge_minimises_its_objective_with_fewer_and_with_more_features_than_rows(width: int) -> None:
    x, y = drawn(0, 20, width), drawn(1, 20, 1)
    fitted = fit_ridge(x, y, names(20), alphas=(0.3,))
    z = ((x - x.mean(0)) / x.std(0, correction=0)) / width**0.5
    exact = torch.linalg.solve(
        z.T @ z / 20 + 0.3 * torch.eye(width, dtype=x.dtype), z.T @ (y - y.mean()) / 20
    )
    torch.testing.assert_close(fitted(x), z @ exact + y.mean(), rtol=1e-9, atol=1e-9)


def test_groups_are_fitted_as_each_alone() -> None:
    x, y = drawn(0, 3, 25, 6), drawn(1, 3, 25, 2)
    together = fit_ridge(x, y, names(25), each=True)
    for group in range(3):
        alone = fit_ridge(x[group], y[group], names(25), each=True)
        torch.testing.assert_close(together(x)[group], alone(x[group]))


def test_patients_are_never_on_both_sides_of_the_choice_of_alpha() -> None:
    # every patient has her own target, and her scans are nearly equal: only rows of the same patient can tell
    who = [name for name in names(20) for _ in range(3)]
    x = drawn(0, 20, 100).repeat_interleave(3, 0) + 0.01 * drawn(1, 60, 100)
    y = drawn(2, 20, 1).repeat_interleave(3, 0)
    by_patient = fit_ridge(x, y, who)
    by_row = fit_ridge(x, y, names(60))
    assert float(by_row.alpha.max()) < 0.01 < float(by_patient.alpha.min())


def test_generalised_cross_validation_is_as_good_as_folds_where_rows_are_patients() -> None:
    x, weight = drawn(0, 80, 30), drawn(1, 30, 1)
    y = x @ weight + 2 * drawn(2, 80, 1)
    unseen = drawn(3, 500, 30)
    errors = [
        float((fit_ridge(x, y, names(80), choice=choice)(unseen) - unseen @ weight).square().mean())
        for choice in ("folds", "generalised")
    ]
    assert errors[1] < 1.2 * errors[0]


def test_ridge_from_the_fold_sums_of_two_sites_is_the_pooled_ridge() -> None:
    x = drawn(0, 40, 7)
    y = x @ drawn(1, 7, 2) + drawn(2, 40, 2)
    folds = torch.from_numpy(patient_folds(names(40), 0))
    joint = torch.cat([x, y], dim=1)
    site = torch.arange(40) % 2
    sums = []
    for fold in range(5):
        parts = []
        for own in (0, 1):
            rows = ((folds == fold) & (site == own)).nonzero()[:, 0]
            parts.append(ErasureMoments.of(joint[rows], [names(40)[int(r)] for r in rows], 1e6))
        sums.append(parts[0] + parts[1])
    pooled = fit_ridge(x, y, names(40), seed=0)
    from_sums = ridge_from_sums(sums, slice(0, 7), slice(7, 9))
    torch.testing.assert_close(from_sums.alpha, pooled.alpha)
    torch.testing.assert_close(from_sums(x), pooled(x), rtol=1e-7, atol=1e-7)


def test_logistic_regression_separates_what_a_linear_map_separates() -> None:
    x, planted = drawn(0, 150, 6), 4 * drawn(1, 6, 3)
    labels = (x @ planted).argmax(1)
    fitted = fit_logistic(x, labels, 3, names(150))
    unseen = drawn(2, 300, 6)
    hits = (fitted(unseen).argmax(1) == (unseen @ planted).argmax(1)).double().mean()
    assert float(hits) > 0.93


def test_logistic_regression_is_at_the_minimum_of_its_objective() -> None:
    x, labels = drawn(0, 30, 50), torch.arange(30) % 3
    fitted = fit_logistic(x, labels, 3, names(30), alphas=(0.1,))
    z = ((x - x.mean(0)) / x.std(0, correction=0)) / 50**0.5
    weight = torch.linalg.lstsq(z, fitted(x) - fitted.bias).solution.requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ weight + fitted.bias, labels)
    loss = loss + 0.05 * weight.square().sum()
    (slope,) = torch.autograd.grad(loss, weight)
    assert float(slope.abs().max()) < 1e-5


def test_a_class_without_rows_is_never_told() -> None:
    x = drawn(0, 20, 3)
    fitted = fit_logistic(x, torch.arange(20) % 2, 3, names(20))
    assert int(fitted(10 * drawn(1, 200, 3)).argmax(1).max()) == 1


@pytest.mark.parametrize("patients", [1, 2])
def test_one_or_two_patients_can_be_fitted_and_nothing_is_chosen(patients: int) -> None:
    x, y = drawn(0, patients, 4), drawn(1, patients, 1)
    assert float(fit_ridge(x, y, names(patients)).alpha) == 1e-2
    labels = torch.arange(patients)
    assert fit_logistic(x, labels, 2, names(patients))(x).argmax(1).tolist() == labels.tolist()


def test_what_is_not_finite_or_has_no_patient_is_refused() -> None:
    x = drawn(0, 4, 2)
    with pytest.raises(ValueError, match="one patient for each row"):
        fit_ridge(x, x, names(3))
    with pytest.raises(ValueError, match="finite features"):
        fit_ridge(x / 0, x, names(4))
    with pytest.raises(ValueError, match="finite targets"):
        fit_ridge(x, x / 0, names(4))
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        fit_logistic(x, torch.arange(4), 2, names(4))
