import numpy as np
import pytest
import torch

from meduet_models.probes.swap_fidelity import (
    counterfactual_ratio,
    match_histogram,
    psnr_db,
    quantiles,
    style_gap_closed,
)


def test_the_gap_closed_is_one_at_the_target_nothing_at_the_source_and_less_beyond() -> None:
    source, target = torch.zeros(5), torch.ones(5)
    readings = [style_gap_closed(x, source, target) for x in (target, source, 0.7 * target, -target)]
    np.testing.assert_allclose(readings, [1.0, 0.0, 0.7, -1.0], atol=1e-6)
    truth, scans = torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    ratios = [counterfactual_ratio(x, scans, truth) for x in (truth, scans, truth / 2)]
    np.testing.assert_allclose(ratios, [0.0, 1.0, 0.25])


def test_an_error_of_a_tenth_is_twenty_decibels() -> None:
    truth = torch.full((2, 1, 4, 4, 4), 0.5)
    assert psnr_db(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)
    assert psnr_db(truth + 7, truth) == pytest.approx(20 * np.log10(2), abs=1e-4)  # clipped to 1
    assert psnr_db(truth, truth) == pytest.approx(100)


def test_matching_undoes_any_rising_change_of_contrast() -> None:
    x = torch.rand(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    matched = match_histogram(x**3, quantiles(x))
    assert psnr_db(matched, x) > 35 > psnr_db(x**3, x) + 20


def test_matching_keeps_equal_voxels_equal_and_takes_the_targets_range() -> None:
    x = torch.zeros(1, 1, 4, 4, 4)
    x[..., 0] = 1.0
    matched = match_histogram(x, torch.tensor([0.2, 0.2, 0.2, 0.2, 0.8]))
    assert len(matched.unique()) == 2
    assert float(matched[..., 1:].unique()) == pytest.approx(0.2)
    assert 0.2 < float(matched[..., 0].unique()) <= 0.8
