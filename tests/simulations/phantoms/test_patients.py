"""Phantom patients: reproducible, invertible, anatomically sensible."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.phantoms.atlas import CHANNELS, grid_affine, grid_shape, load_atlas
from simulations.phantoms.patients import (
    TISSUES,
    Lesion,
    Patient,
    Population,
    apply_patient,
    displacement_mm,
    draw_patient,
    label_volume,
    lattice_affine,
    volumes_ml,
)


def jacobian_determinant(displacement: Any, spacing_mm: float) -> Any:
    """Local volume ratio of `x + displacement(x)` by central differences, [x y z]; positive: invertible."""
    gradient = np.stack([np.stack(np.gradient(d, spacing_mm)) for d in displacement])  # 3 3 x y z
    matrices = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)
    ratio: Any = np.linalg.det(matrices).astype(np.float32)
    return ratio


def patient(seed: int, **changes: object) -> Patient:
    drawn = draw_patient(np.random.default_rng(seed), Population(disease_share=0.0))
    return dataclasses.replace(drawn, **changes)


def sample_lattice(field: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """Linear interpolation by another library than the one under test; points [3 n]."""
    from scipy.ndimage import map_coordinates

    index = (points_mm - lattice_affine()[:3, 3:]) / lattice_affine()[0, 0]
    return np.stack([map_coordinates(f, index, order=1, mode="nearest") for f in field])


def test_a_seed_fixes_patient_and_anatomy_bit_for_bit() -> None:
    population = Population(disease_share=1.0)
    first, again, other = (draw_patient(np.random.default_rng(s), population) for s in (3, 3, 4))
    assert first.sha256 == again.sha256 != other.sha256
    atlas = load_atlas(4)
    one, two = apply_patient(first, atlas), apply_patient(again, atlas)
    assert one.tissues.tobytes() == two.tissues.tobytes()
    assert one.texture.tobytes() == two.texture.tobytes()


def test_drawing_and_applying_leave_the_global_generators_alone() -> None:
    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())
    apply_patient(draw_patient(np.random.default_rng(0), Population()), load_atlas(4))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), deformation_mm=st.sampled_from([2.0, 4.0, 6.0]), age=st.integers(20, 90)
)
def test_every_deformation_is_invertible(seed: int, deformation_mm: float, age: int) -> None:
    population = Population(age_mean=float(age), age_sd=0.0, deformation_mm=deformation_mm)
    drawn = draw_patient(np.random.default_rng(seed), population)
    for inverse in (False, True):
        assert jacobian_determinant(displacement_mm(drawn, inverse=inverse), 4.0).min() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back_is_where_we_started(seed: int) -> None:
    drawn = patient(seed)
    forward, inverse = displacement_mm(drawn), displacement_mm(drawn, inverse=True)
    points = np.random.default_rng(seed).uniform([-80, -110, -75], [80, 80, 85], size=(4000, 3)).T
    there = points + sample_lattice(forward, points)
    back = there + sample_lattice(inverse, there)
    error_mm = np.linalg.norm(back - points, axis=0)
    moved_mm = np.linalg.norm(there - points, axis=0)
    assert moved_mm.mean() > 3
    assert error_mm.mean() < 0.05
    assert error_mm.max() < 1.0


def test_no_velocity_no_ageing_gives_the_template_back() -> None:
    still = patient(0, velocity=np.zeros_like(patient(0).velocity), atrophy=0.0, head_size=(1.0, 1.0, 1.0))
    atlas = load_atlas(4)
    shown = apply_patient(still, atlas)
    inner = atlas.channels[CHANNELS.index("outside_brain_mm")] < -4
    for tissue in ("gm", "wm"):
        difference = shown.tissues[TISSUES.index(tissue)] - atlas.channels[CHANNELS.index(tissue)]
        assert np.abs(difference[inner]).max() < 1e-4


def test_shares_of_tissue_are_shares() -> None:
    diseased = draw_patient(np.random.default_rng(1), Population(disease_share=1.0, lesions_mean=12))
    tissues = apply_patient(diseased, load_atlas(4)).tissues
    assert tissues.min() >= -1e-6
    assert tissues.sum(axis=0).max() <= 1 + 1e-5


def test_anatomy_is_a_function_of_space_whatever_grid_samples_it() -> None:
    drawn, atlas = patient(5), load_atlas(2)
    fine = apply_patient(drawn, atlas)
    coarse = apply_patient(drawn, atlas, grid_affine(4), grid_shape(4))
    assert np.abs(fine.tissues[:, ::2, ::2, ::2] - coarse.tissues).max() < 1e-3


def test_age_costs_grey_matter_and_widens_the_ventricles() -> None:
    young, old = patient(2, atrophy=0.0), patient(2, atrophy=1.0)
    atlas = load_atlas(4)
    before, after = apply_patient(young, atlas), apply_patient(old, atlas)
    assert 0.70 < volumes_ml(after)["gm"] / volumes_ml(before)["gm"] < 0.95
    deep = atlas.channels[CHANNELS.index("outside_brain_mm")] < -25
    fluid = [a.tissues[TISSUES.index("csf")][deep].sum() for a in (before, after)]
    assert fluid[1] > 1.3 * fluid[0]


def test_lesions_take_the_place_of_white_matter_and_nothing_else() -> None:
    atlas = load_atlas(2)
    lesions = (Lesion((25.0, -10.0, 28.0), (6.0, 6.0, 6.0)), Lesion((-28.0, -30.0, 28.0), (4.0, 5.0, 4.0)))
    healthy, diseased = (apply_patient(patient(7, lesions=found), atlas) for found in ((), lesions))
    wm, lesion = TISSUES.index("wm"), TISSUES.index("lesion")
    assert np.allclose(diseased.tissues[wm] + diseased.tissues[lesion], healthy.tissues[wm], atol=1e-6)
    assert healthy.tissues[lesion].max() == 0
    expected_ml = 4 / 3 * np.pi * (6**3 + 4 * 5 * 4) / 1000
    assert 0.4 * expected_ml < volumes_ml(diseased)["lesion"] < 1.8 * expected_ml
    assert (label_volume(diseased) == 1 + TISSUES.index("lesion")).sum() > 50


def test_lesions_are_drawn_in_white_matter() -> None:
    population = Population(disease_share=1.0, lesions_mean=8)
    atlas = load_atlas(2)
    shown = [draw_patient(np.random.default_rng(s), population) for s in range(3)]
    for drawn in shown:
        volume_ml = sum(4 / 3 * np.pi * np.prod(one.radii_mm) for one in drawn.lesions) / 1000
        assert volumes_ml(apply_patient(drawn, atlas))["lesion"] > 0.4 * volume_ml


def test_a_larger_head_holds_a_larger_brain() -> None:
    atlas = load_atlas(4)
    small, large = (patient(3, head_size=(size,) * 3) for size in (0.95, 1.05))
    brain_ml = []
    for drawn in (small, large):
        volume = volumes_ml(apply_patient(drawn, atlas))
        brain_ml.append(volume["gm"] + volume["wm"])
    assert brain_ml[1] / brain_ml[0] == pytest.approx((1.05 / 0.95) ** 3, rel=0.02)


def test_brains_have_human_volumes() -> None:
    brains = [draw_patient(np.random.default_rng(s), Population()) for s in range(6)]
    for volume in (volumes_ml(apply_patient(drawn, load_atlas(4))) for drawn in brains):
        assert 500 < volume["gm"] < 1150
        assert 400 < volume["wm"] + volume["lesion"] < 850


def test_an_atlas_of_another_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="resolution_mm to be one of 1, 2, 4; got 3"):
        grid_shape(3)
