"""What a promise allows an attacker: epsilon, delta, and the largest share of members that anybody can find.

What this file does not do: account for a run; promises come from the ledger.

Source: the Gaussian mechanism's exact curve: `privacy/accounting.py`; the largest rate: the
trade-off curve of (epsilon, delta), Kairouz et al. 2015, minimised over the mechanism's privacy profile.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from privacy.accounting import gaussian_delta


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism of sensitivity 1 at this delta."""
    if gaussian_delta(sigma, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(sigma, high) > delta:
        high *= 2
    return _bisected(lambda epsilon: gaussian_delta(sigma, epsilon) > delta, 0.0, high)


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """The least sigma of sensitivity 1 with this epsilon and delta."""
    return _bisected(lambda sigma: gaussian_delta(sigma, epsilon) > delta, 1e-3, 1e6)


def largest_rate(false_alarms: float, epsilon: float, delta: float) -> float:
    """Share of members that any attacker can find at so many false alarms, under (epsilon, delta)."""
    if math.isinf(epsilon):
        return 1.0
    first = math.exp(min(epsilon, 700.0)) * false_alarms + delta
    second = 1 - math.exp(-epsilon) * (1 - delta - false_alarms)
    return max(0.0, min(1.0, first, second))


def largest_rate_of(
    false_alarms: float, delta_of: Callable[[float], float], epsilons: Sequence[float] = ()
) -> float:
    """The same under a whole privacy profile, epsilon to delta: the least over epsilons."""
    grid = epsilons or [*np.linspace(0, 20, 401)]
    return min(largest_rate(false_alarms, float(epsilon), delta_of(float(epsilon))) for epsilon in grid)


def _bisected(above: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return high
