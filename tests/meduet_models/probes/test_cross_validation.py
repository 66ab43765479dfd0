import numpy as np
import pytest

from meduet_models.probes.cross_validation import nested, patient_folds, split

PATIENTS = [f"p{i // 3}" for i in range(60)]


def test_no_patient_is_on_both_sides_and_folds_are_even() -> None:
    folds = patient_folds(PATIENTS, seed=0)
    for patient in set(PATIENTS):
        assert len({folds[i] for i, p in enumerate(PATIENTS) if p == patient}) == 1
    assert np.bincount(folds).tolist() == [12] * 5
    assert (patient_folds(PATIENTS, seed=1) != folds).any()
    assert (patient_folds(PATIENTS, seed=0) == folds).all()


def test_each_stratum_is_spread_over_the_folds() -> None:
    names = [str(i) for i in range(50)]
    strata = [0] * 40 + [1] * 10
    folds = patient_folds(names, 3, strata=strata)
    assert np.bincount(folds[40:]).tolist() == [2] * 5


def test_two_patients_cannot_be_cross_validated() -> None:
    with pytest.raises(ValueError, match="three patients to cross-validate; got 2"):
        patient_folds(["a", "b", "a"], 0)


def test_the_rotation_keeps_every_inner_product_of_standardised_features() -> None:
    x = np.random.default_rng(0).normal(size=(60, 200)) * 3 + 1
    x[:, 7] = 4.0  # never varies
    part = split(x, patient_folds(PATIENTS, 0), test=2)
    mean, deviation = x[part.train].mean(0), x[part.train].std(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.nan_to_num((x - mean) / deviation, nan=0.0) / np.sqrt(199)
    np.testing.assert_allclose(part.z_train @ part.z_train.T, z[part.train] @ z[part.train].T, atol=1e-9)
    np.testing.assert_allclose(part.z_test @ part.z_train.T, z[part.test] @ z[part.train].T, atol=1e-9)
    assert part.z_train.shape[1] <= len(part.train)


def test_the_inner_splits_never_see_the_outer_fold() -> None:
    x = np.random.default_rng(1).normal(size=(60, 4))
    for outer, inner in nested(x, patient_folds(PATIENTS, 0)):
        assert len(inner) == 4
        for part in inner:
            assert not set(outer.test) & {*part.train, *part.test}
