"""Hospitals by appearance: patients grouped by what their scans look like after windowing.

A scan's appearance is four numbers of its volume in [0, 1]: mean, deviation, gradient energy (mean squared
difference of neighbours per mm, its logarithm: sharpness) and entropy of the grey values. Windowing takes
brightness and contrast of stored units away first, so that groups differ in what a network still sees. The
patients' standardised numbers go into k-means with a floor on the size of groups (constrained k-means:
Bradley, Bennett, Demiriz, MSR-TR-2000-65); the start is a cut along the first principal axis, so no draw is
involved. Groups of one hospital's scans are a simulation of several hospitals, and are to be called one.

Does not do: read scans or write manifests (`split_hospitals.py`).

Axes: n = patients, f = numbers of appearance, g = groups.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from scans.scans import Scan
from scans.volume_plan import VolumePlan
from scans.volumes import intensity_range

SMALLEST_SHARE = 0.5
"""Least size of a group, as a share of patients over groups."""
_WINDOW = VolumePlan(modality="any")  # the robust percentiles that every MR plan starts from
_BINS = 64
_MOST_STEPS = 100


def appearance(scan: Scan) -> Float64[np.ndarray, " f"]:
    """Mean, deviation, log10 gradient energy (per mm²) and entropy (bits) of the windowed scan."""
    low, high = intensity_range(scan.array, _WINDOW)
    windowed = np.clip((scan.array.astype(np.float64) - low) / max(high - low, 1e-12), 0.0, 1.0)
    spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    energy = sum(
        float(np.square(np.diff(windowed, axis=axis) / spacing_mm[axis]).mean())
        for axis in range(3)
        if windowed.shape[axis] > 1
    )
    shares = np.histogram(windowed, _BINS, (0.0, 1.0))[0] / windowed.size
    bits = -float((shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    return np.array([windowed.mean(), windowed.std(), np.log10(energy + 1e-12), bits])


def by_appearance(seen: Mapping[str, NDArray[np.float64]], num_groups: int) -> dict[str, int]:
    """Group number of every patient from her scans' mean appearance; the darkest group (least mean) first.

    The same whatever the order of `seen`. No group is smaller than half an equal share.
    """
    patients = sorted(seen)
    raw = np.stack([seen[patient] for patient in patients])
    deviation = raw.std(axis=0)
    points = (raw - raw.mean(axis=0)) / np.where(deviation < 1e-12, 1.0, deviation)
    smallest = max(1, int(SMALLEST_SHARE * len(patients) / num_groups))
    group = constrained_k_means(points, num_groups, smallest)
    order = np.argsort([raw[group == g, 0].mean() for g in range(num_groups)])
    place = {int(g): index for index, g in enumerate(order)}
    return {patient: place[int(g)] for patient, g in zip(patients, group, strict=True)}


def constrained_k_means(
    points: Float[np.ndarray, "n f"], num_groups: int, smallest: int
) -> Int[np.ndarray, " n"]:
    """Group of each point: k-means in which every group has at least `smallest` members.

    Each assignment is the cheapest that keeps the floor (`smallest` reserved places per group, the other
    places free). The caller sees to it that `num_groups * smallest <= n`.
    """
    n = len(points)
    assert num_groups * smallest <= n
    centred = points - points.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    ranks = np.argsort(np.argsort(centred @ axis, kind="stable"), kind="stable")
    group = ranks * num_groups // n
    for _ in range(_MOST_STEPS):
        means = np.stack([points[group == g].mean(axis=0) for g in range(num_groups)])
        distance = np.square(points[:, None] - means[None]).sum(axis=2)  # n g
        free = np.repeat(distance.min(axis=1)[:, None], n - num_groups * smallest, axis=1)
        _, place = linear_sum_assignment(np.hstack([np.repeat(distance, smallest, axis=1), free]))
        reserved = place < num_groups * smallest
        following = np.where(reserved, place // smallest, distance.argmin(axis=1))
        if np.array_equal(following, group):
            break
        group = following
    return group
