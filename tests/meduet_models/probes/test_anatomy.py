import math

import pytest
import torch
from torch import Tensor

from meduet_models.probes.anatomy import anatomy_probe, content_through_style

PATIENTS = [str(i) for i in range(120)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_known_shares_of_variance_are_found() -> None:
    x = drawn(400, 10)
    signal = x @ drawn(10, 1, seed=1) / 10**0.5
    signal = signal / signal.std()
    noise = drawn(400, 1, seed=2)
    targets = torch.cat([signal, (0.5**0.5) * (signal + noise), noise], dim=1)
    read = anatomy_probe(x, targets, [str(i) for i in range(400)], 0)
    assert read[0] > 0.99
    assert read[1] == pytest.approx(0.5, abs=0.1)  # two standard errors of an R² over 400 patients
    assert -0.1 < read[2] < 0.05


def test_thousands_of_features_of_a_hundred_scans_are_read_without_overfitting() -> None:
    factor = drawn(120, 3)
    x = factor @ drawn(3, 5000, seed=1) + 0.5 * drawn(120, 5000, seed=2)
    read = anatomy_probe(x, torch.cat([factor[:, :1], drawn(120, 1, seed=3)], 1), PATIENTS, 0)
    assert read[0] > 0.9 and read[1] < 0.1


def test_views_of_a_patient_do_not_teach_her_anatomy() -> None:
    x = drawn(30, 64).repeat_interleave(4, 0)
    target = drawn(30, 1, seed=1).repeat_interleave(4, 0)
    patients = [str(i // 4) for i in range(120)]
    assert anatomy_probe(x, target, patients, 0)[0] < 0.2
    assert anatomy_probe(x, target, PATIENTS, 0)[0] > 0.9  # what the leak would have said


def test_unknown_values_are_left_out_and_a_target_of_nobody_is_unknown() -> None:
    x = drawn(120, 4)
    target = x[:, :1].clone()
    target[::3] = torch.nan
    anatomy = torch.cat([target, torch.full((120, 1), torch.nan), torch.ones(120, 1)], dim=1)
    read = anatomy_probe(x, anatomy, PATIENTS, 0)
    assert read[0] > 0.99
    assert math.isnan(read[1]) and math.isnan(read[2])


def test_content_is_read_through_style_as_far_as_they_share_something() -> None:
    style, own = drawn(120, 4), drawn(120, 12, seed=1)
    shared = style @ drawn(4, 12, seed=2)
    shared = shared / shared.std() * own.std()
    assert content_through_style(own, style, PATIENTS, 0) < 0.05
    assert content_through_style(shared, style, PATIENTS, 0) > 0.98
    assert 0.35 < content_through_style(own + shared, style, PATIENTS, 0) < 0.65
