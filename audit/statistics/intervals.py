"""Intervals of what an audit counts: shares, areas under a curve, and the rate at few false alarms.

All are 95% and two-sided unless said, exact or score intervals: at the edges (0 of n, area 1) they do not
collapse to a point. What cannot be estimated from so few is None, not a number.

Source: Clopper and Pearson 1934; Wilson 1927; area under the curve: Newcombe 2006, method 5 (a score interval
around the variance of Hanley and McNeil 1982; at one half it is that of the rank test).
"""

import math

import numpy as np
from scipy.stats import beta, norm

LEVEL = 0.95
ONE_SIDE = 0.025
"""Share that a 95% interval leaves beyond one end: so many of nobody's memberships are claimed."""


def clopper_pearson(hits: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a share. Raises `ValueError` unless 0 <= hits <= of."""
    _check(hits, of)
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, of - hits + 1))
    high = 1.0 if hits == of else float(beta.ppf(1 - tail, hits + 1, of - hits))
    return low, high


def wilson(hits: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share. Raises `ValueError` as `clopper_pearson`."""
    _check(hits, of)
    if of == 0:
        return 0.0, 1.0
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    share = hits / of
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = math.sqrt(z2 * (share * (1 - share) / of + z2 / (4 * of * of))) / (1 + z2 / of)
    return max(0.0, centre - half), min(1.0, centre + half)


def area(inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under the ROC curve: how often a member's score is above another's; ties count half."""
    order = np.sort(outside)
    below = np.searchsorted(order, inside, "left") + np.searchsorted(order, inside, "right")
    return float(below.mean() / (2 * len(outside)))


def roc(inside: np.ndarray, outside: np.ndarray) -> list[tuple[float, float]]:
    """Corners of the ROC curve from (0, 0) to (1, 1): share of others and of members above each threshold."""
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    above = [np.searchsorted(np.sort(one), thresholds, "left") for one in (outside, inside)]
    false, true = (1 - below / len(one) for below, one in zip(above, (outside, inside), strict=True))
    points = [(0.0, 0.0), *zip(false.round(4).tolist(), true.round(4).tolist(), strict=True)]
    corner = [
        one
        for n, one in enumerate(points)
        if n in (0, len(points) - 1) or not _straight(points[n - 1], one, points[n + 1])
    ]
    return corner


def area_interval(value: float, n_in: int, n_out: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of an area under the curve over so many members and others (at least one each)."""
    z = float(norm.ppf((1 + level) / 2))

    def outside(candidate: float) -> bool:
        return abs(value - candidate) > z * math.sqrt(_area_variance(candidate, n_in, n_out))

    return _edge(outside, value, 0.0), _edge(outside, value, 1.0)


def smallest_told(n_in: int, n_out: int, level: float = LEVEL) -> float:
    """The area above which the interval of these numbers leaves out one half."""
    return min(1.0, 0.5 + float(norm.ppf((1 + level) / 2)) * math.sqrt(_area_variance(0.5, n_in, n_out)))


def rate_at(
    inside: np.ndarray, outside: np.ndarray, false_alarms: float
) -> tuple[float, tuple[float, float]] | None:
    """Share of members above the threshold that lets at most this share of others pass, with its interval.

    None below 1 / `false_alarms` others: the finest share that can be counted is 1 / n.
    """
    allowed = math.floor(false_alarms * len(outside) + 1e-9)
    if allowed < 1:
        return None
    threshold = np.sort(outside)[::-1][allowed] if allowed < len(outside) else -math.inf
    hits = int((inside > threshold).sum())
    return hits / len(inside), clopper_pearson(hits, len(inside))


def _straight(before: tuple[float, float], at: tuple[float, float], after: tuple[float, float]) -> bool:
    """Whether a point lies within a run along one axis."""
    return before[0] == at[0] == after[0] or before[1] == at[1] == after[1]


def _check(hits: int, of: int) -> None:
    if not 0 <= hits <= of:
        raise ValueError(f"Expected a count of at most {of}; got {hits}.")


def _area_variance(value: float, n_in: int, n_out: int) -> float:
    pairs = (n_in + n_out) / 2 - 1
    spread = (1 - value) / (2 - value) + value / (1 + value)
    return value * (1 - value) * (1 + pairs * spread) / (n_in * n_out)


def _edge(outside: object, value: float, end: float) -> float:
    """The last candidate between `value` and `end` that is not told from `value`."""
    assert callable(outside)
    if not outside(end) and value == end:
        return end
    near, far = value, end
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (near, middle) if outside(middle) else (middle, far)
    return near
