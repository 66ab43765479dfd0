"""Logistic regression from sums: equal wherever the patients are, calibrated, and not beaten by steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_models.erasure import ErasureMoments
from meduet_models.probes.cross_validation import patient_folds
from meduet_models.probes.discriminant import is_of_two_classes, logistic_from_sums
from meduet_models.probes.ridge import fit_logistic, ridge_from_sums

WIDTH, SHIFT = 12, 0.35


def people(count: int, seed: int, shift: float = SHIFT, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Features of two classes of one, correlated shape, and the class."""
    draws = torch.Generator().manual_seed(seed)
    label = torch.rand(count, generator=draws) < share
    mixing = torch.eye(WIDTH) + 0.3 * torch.ones(WIDTH, WIDTH)
    x = torch.randn(count, WIDTH, generator=draws) @ mixing
    return (x + shift * label[:, None] * torch.linspace(-1, 1, WIDTH) * 2).double(), label.long()


def sums_of(x: Tensor, label: Tensor, site: Tensor) -> list[ErasureMoments]:
    names = [str(i) for i in range(len(x))]
    folds = torch.from_numpy(patient_folds(names, 0))
    joint, told = torch.cat([x, (2.0 * label - 1)[:, None].double()], dim=1), []
    for fold in range(5):
        parts = []
        for own in site.unique():
            rows = ((folds == fold) & (site == own)).nonzero()[:, 0]
            parts.append(ErasureMoments.of(joint[rows], [names[int(row)] for row in rows], 1e6))
        told.append(sum(parts[1:], start=parts[0]))
    return told


def fitted(count: int, seed: int, shift: float = SHIFT) -> tuple[Tensor, Tensor, list[ErasureMoments]]:
    x, label = people(count, seed, shift)
    return x, label, sums_of(x, label, torch.zeros(count))


def entropy(log_odds: Tensor, label: Tensor) -> float:
    return float(F.binary_cross_entropy_with_logits(log_odds, label.double()))


def test_of_two_sites_it_is_that_of_their_union() -> None:
    x, label, pooled = fitted(90, 0)
    two = sums_of(x, label, torch.arange(90) % 2)
    source = slice(0, WIDTH)
    torch.testing.assert_close(
        logistic_from_sums(two, source, WIDTH)(x), logistic_from_sums(pooled, source, WIDTH)(x)
    )


def test_it_is_as_good_as_steps_on_patients_in_one_place_and_far_above_the_share() -> None:
    """Ten draws: a mean cross-entropy has a standard error of about .003 here."""
    unseen, truth = people(4000, 1000)
    closed, steps, share = [], [], []
    for draw in range(10):
        x, label, sums = fitted(120, draw)
        newton = fit_logistic(x, label, 2, [str(i) for i in range(120)])
        closed.append(entropy(logistic_from_sums(sums, slice(0, WIDTH), WIDTH)(unseen)[:, 0], truth))
        told = newton(unseen)
        steps.append(entropy(told[:, 1] - told[:, 0], truth))
        share.append(entropy(torch.logit(label.double().mean()).expand(len(truth)), truth))
    closed_form, by_steps, by_share = (sum(values) / 10 for values in (closed, steps, share))
    assert closed_form < by_steps + 0.01 and by_steps < by_share - 0.1


def test_probabilities_are_those_of_the_people_who_are_told_them_and_a_ridges_are_not() -> None:
    _, _, sums = fitted(400, 3)
    unseen, truth = people(20000, 1001)
    told = logistic_from_sums(sums, slice(0, WIDTH), WIDTH)(unseen)[:, 0].sigmoid()
    ridge = (ridge_from_sums(sums, slice(0, WIDTH), slice(WIDTH, None))(unseen)[:, 0] + 1) / 2

    def off(probability: Tensor) -> float:
        rows = probability.argsort().tensor_split(10)
        gaps = [abs(float(probability[own].mean() - truth[own].double().mean())) for own in rows]
        return max(gaps)

    assert off(told) < 0.1 < off(ridge)


def test_what_nothing_tells_is_told_by_its_share() -> None:
    unseen, truth = people(4000, 1002, shift=0.0)
    extra = []
    for draw in range(10):
        _, label, sums = fitted(60, 50 + draw, shift=0.0)
        told = logistic_from_sums(sums, slice(0, WIDTH), WIDTH)(unseen)[:, 0]
        share = torch.logit(label.double().mean()).expand(len(truth))
        extra.append(entropy(told, truth) - entropy(share, truth))
    assert sum(extra) / 10 < 0.03


def test_one_class_numbers_and_two_folds_are_refused() -> None:
    x, label, sums = fitted(60, 4)
    one = sums_of(x, torch.ones_like(label), torch.zeros(60))
    assert is_of_two_classes(sums, WIDTH) and not is_of_two_classes(one, WIDTH)
    assert not is_of_two_classes(sums, 0)
    for wrong, target in ((one, WIDTH), (sums, 0), (sums[:2], WIDTH)):
        with pytest.raises(ValueError, match="three folds of patients of two classes"):
            logistic_from_sums(wrong, slice(1, WIDTH), target)
