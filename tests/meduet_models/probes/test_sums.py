"""Every reading from sums equals that of the same patients in one place."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from meduet_models.erasure import ErasureMoments
from meduet_models.probes.anatomy import out_of_fold
from meduet_models.probes.sums import (
    all_but,
    coordinates,
    explained_from_sums,
    linear_probe_from_sums,
    pooled_folds,
    read_site,
    site_hits,
    site_probes_by_fold,
)

FOLDS, PER_SITE = 5, 40
SITES = torch.arange(3).repeat_interleave(PER_SITE)
FOLD = torch.arange(3 * PER_SITE) % FOLDS
CONTENT, STYLE, TARGET = slice(0, 6), slice(6, 9), slice(9, 11)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joint() -> Tensor:
    """Content with a site in it, style that is partly content, one target in content and one in nothing."""
    content = drawn(120, 6) + 1.5 * drawn(3, 6, seed=1)[SITES]
    style = content[:, :3] @ drawn(3, 3, seed=2) + drawn(120, 3, seed=3)
    targets = torch.stack([content @ drawn(6, seed=4) + 0.5 * drawn(120, seed=5), drawn(120, seed=6)], dim=1)
    return torch.cat([content, style, targets], dim=1)


def fold_sums(x: Tensor, rows: Tensor) -> list[ErasureMoments]:
    def fold(number: int) -> ErasureMoments:
        mine = (rows & (FOLD == number)).nonzero()[:, 0]
        return ErasureMoments.of(x[mine], [str(int(i)) for i in mine], bound=1e6)

    return [fold(number) for number in range(FOLDS)]


def by_site(x: Tensor) -> dict[str, list[ErasureMoments]]:
    return {str(site): fold_sums(x, SITES == site) for site in range(3)}


def test_the_linear_probe_from_sums_is_the_discriminant_of_pooled_features() -> None:
    x = joint()[:, CONTENT]
    moments = {site: all_but(folds) for site, folds in by_site(x).items()}
    weight, bias = linear_probe_from_sums(moments, shrinkage=0.1)
    assert (read_site(x, weight, bias) == SITES).double().mean() > 0.7
    pooled = LinearDiscriminantAnalysis(solver="eigen", priors=[1 / 3] * 3).fit(x, SITES)
    unshrunk, offset = linear_probe_from_sums(moments, shrinkage=0.0)
    scores, expected = x @ unshrunk + offset, torch.from_numpy(pooled.decision_function(x.numpy()))
    torch.testing.assert_close(scores - scores[:, :1], expected - expected[:, :1], rtol=1e-8, atol=1e-8)


def test_hits_counted_at_the_sites_are_those_of_a_pooled_cross_validation() -> None:
    x = joint()
    weight, bias = site_probes_by_fold(by_site(x), CONTENT)
    hits = [
        site_hits(x[SITES == site][:, CONTENT], FOLD[SITES == site], weight, bias, site) for site in range(3)
    ]
    said = torch.empty(120, dtype=torch.long)
    for fold in range(FOLDS):
        train, test = x[FOLD != fold], FOLD == fold
        moments = {
            str(s): ErasureMoments.of(
                train[SITES[FOLD != fold] == s][:, CONTENT], [str(i) for i in range(32)], bound=1e6
            )
            for s in range(3)
        }
        said[test] = read_site(x[test][:, CONTENT], *linear_probe_from_sums(moments))
    assert hits == [int((said[SITES == s] == s).sum()) for s in range(3)]
    assert sum(hits) > 80


@pytest.mark.parametrize(("source", "target"), [(CONTENT, TARGET), (STYLE, TARGET), (STYLE, CONTENT)])
def test_ridge_from_sums_of_sites_equals_ridge_on_pooled_patients(source: slice, target: slice) -> None:
    x = joint()
    array, names = x.numpy(), [str(i) for i in range(120)]
    for together in (False, True):
        read = explained_from_sums(pooled_folds(by_site(x)), source, target, together)
        error, spread = out_of_fold(
            array[:, source], array[:, target], names, 0, together, folds=FOLD.numpy()
        )
        expected = (
            1 - error.sum(keepdims=True) / spread.sum(keepdims=True) if together else 1 - error / spread
        )
        np.testing.assert_allclose(read.numpy(), expected, rtol=1e-8, atol=1e-8)
        one_site = explained_from_sums(fold_sums(x, SITES >= 0), source, target, together)
        torch.testing.assert_close(read, one_site, rtol=1e-8, atol=1e-8)


def test_planted_shares_are_found_and_noise_is_not() -> None:
    content, noise = explained_from_sums(pooled_folds(by_site(joint())), CONTENT, TARGET).tolist()
    assert content > 0.9 and noise < 0.1


def test_coordinates_are_the_sums_of_those_coordinates() -> None:
    x = joint()
    chosen = coordinates(fold_sums(x, SITES == 0)[0], STYLE)
    alone = fold_sums(x[:, STYLE], SITES == 0)[0]
    torch.testing.assert_close(chosen.to_vector(), alone.to_vector())


def test_two_folds_cannot_both_choose_and_test() -> None:
    with pytest.raises(ValueError, match="three folds"):
        explained_from_sums(fold_sums(joint(), SITES == 0)[:2], CONTENT, TARGET)
