"""Hospitals by appearance: known groups found, whatever the order, with a floor on their sizes."""

import csv
from pathlib import Path

import numpy as np
import pytest

from scans.scans import Scan
from scans.volumes import read_scan
from simulations.hospitals.appearance import appearance, by_appearance, constrained_k_means
from simulations.hospitals.make import SplitHospitals, make_hospitals


def blobs(sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0, 0, 0], [8, 0, 3, 0], [0, 9, 0, 4], [9, 9, 5, 9]], float)
    return np.concatenate([rng.normal(centres[i], 0.5, (n, 4)) for i, n in enumerate(sizes)])


def scan_of(array: np.ndarray) -> Scan:
    return Scan(array.astype(np.float32), np.eye(4))


def test_planted_groups_are_found_and_the_order_of_patients_does_not_matter() -> None:
    points = blobs((20, 14, 17, 25))
    seen = {f"p{i:03d}": point for i, point in enumerate(points)}
    place = by_appearance(seen, 4)
    truth = np.repeat(range(4), (20, 14, 17, 25))
    found = np.array([place[p] for p in sorted(seen)])
    assert len({(a, b) for a, b in zip(truth, found, strict=True)}) == 4, "one group for each planted one"
    shuffled = dict(sorted(seen.items(), key=lambda item: item[1][0]))
    assert by_appearance(shuffled, 4) == place
    means = [points[found == g, 0].mean() for g in range(4)]
    assert means == sorted(means), "the darkest group is the first"


def test_no_group_is_smaller_than_the_floor_and_the_nearest_fill_it() -> None:
    points = np.concatenate([np.linspace(0, 1, 18)[:, None], np.array([[50.0], [51.0]])])
    group = constrained_k_means(points, 2, smallest=5)
    sizes = np.bincount(group)
    assert sorted(sizes) == [5, 15]
    assert set(np.flatnonzero(group == group[-1])) == {15, 16, 17, 18, 19}


def test_appearance_ignores_stored_units_and_hears_blur() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.random((16, 18, 14)) + np.linspace(0, 3, 16)[:, None, None]
    units = appearance(scan_of(sharp))
    np.testing.assert_allclose(appearance(scan_of(sharp * 700 + 90)), units, rtol=1e-3)
    blurred = (sharp + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2) + np.roll(sharp, -1, 1)) / 4
    assert appearance(scan_of(blurred))[2] < units[2] - 0.2
    flat = np.zeros((4, 4, 4))
    flat[:2] = 1.0
    mean, deviation, energy, bits = appearance(scan_of(flat))
    assert (mean, deviation) == (0.5, 0.5)
    assert energy == pytest.approx(np.log10(1 / 3)), "one of three steps along one axis is 1"
    assert bits == pytest.approx(1.0)


def test_the_hippocampus_scans_divide_into_four_hospitals_by_appearance(
    data_root: Path, tmp_path: Path
) -> None:
    root = data_root / "msd_hippocampus"
    plan = SplitHospitals(root=str(root), num_hospitals=4, by="appearance")
    hospitals = make_hospitals(plan, tmp_path)
    paths = []
    for hospital in hospitals:
        with (hospital.root / "manifest.csv").open() as stream:
            paths.append([row["path"] for row in csv.DictReader(stream)])
    every = sorted(path for own in paths for path in own)
    assert every == sorted(str(p.resolve()) for p in (root / "images").glob("*.nii.gz"))
    assert min(map(len, paths)) >= len(every) // 8, "half an equal share"
    seen = [appearance(read_scan(Path(own[0]))) for own in paths]
    assert len({tuple(one) for one in seen}) == 4
